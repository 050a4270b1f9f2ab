"""A finished network's weights on disk, as safetensors: no pickle, every tensor or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from posefabric.run import write_atomic
from posefabric.structures import PosefabricError


def save_weights(
    path: Path | str,
    tensors: torch.nn.Module | Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network's parameters and buffers as safetensors, atomically.

    ``metadata``: text that is kept in the file (architecture digest, skeleton, ...).
    Raises PosefabricError when the disk is full.
    """
    if isinstance(tensors, torch.nn.Module):
        tensors = tensors.state_dict()
    # Cloned, since the format knows neither shared memory nor memory layouts.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_atomic(Path(path), safetensors.torch.save(copies, metadata=dict(metadata or {})))


def read_weights(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises PosefabricError when it is missing, not readable, or not such a file.
    """
    try:
        # Opened here first, so that the reason comes with the system's own words.
        Path(path).open("rb").close()
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except OSError as error:
        raise PosefabricError(
            f"{path}: cannot be read ({error.strerror or error}); expected a safetensors file"
        ) from error
    except safetensors.SafetensorError as error:
        raise PosefabricError(
            f"{path}: is damaged or no safetensors file ({error}); write or copy it again"
        ) from error


def load_weights(path: Path | str, network: torch.nn.Module) -> dict[str, str]:
    """Fill a network from a safetensors file, every tensor or none; returns the metadata.

    Raises PosefabricError with the file and the names that are missing, not expected, or of
    another shape.
    """
    tensors, metadata = read_weights(path)
    expected = network.state_dict()
    problems = [
        _listed("missing", [name for name in expected if name not in tensors]),
        _listed("not expected", [name for name in tensors if name not in expected]),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in tensors and tensors[name].shape != tensor.shape
            ],
        ),
    ]
    if any(problems):
        raise PosefabricError(
            f"{path}: does not fit this {type(network).__name__}: "
            f"{'; '.join(filter(None, problems))}; load it into the architecture it was saved with"
        )
    network.load_state_dict(tensors)
    return metadata


def _listed(what: str, names: list[str], most: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what} ({', '.join(names[:most])}{more})"
