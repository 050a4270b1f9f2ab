"""Checkpoints a run goes on from exactly (a finished network's weights: models/weights.py)."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posefabric.models.weights import load_weights, read_weights, save_weights
from posefabric.run import RunFolder, remove_temporaries, write_atomic
from posefabric.structures import PosefabricError

__all__ = [
    "capture_random_state",
    "load_checkpoint",
    "load_weights",
    "read_weights",
    "restore_random_state",
    "save_checkpoint",
    "save_weights",
]

INDEX_NAME = "index.json"
FORMAT_VERSION = 1

Generator = torch.Generator | np.random.Generator | random.Random

logger = logging.getLogger(__name__)
_PLAIN = (bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)
_FILE_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")


def save_checkpoint(run: RunFolder, state: Mapping[str, Any], *, step: int, keep: int = 2) -> Path:
    """Write ``state`` as the newest checkpoint and drop all but the last ``keep``.

    ``state``: nested dicts, lists and tuples of tensors and plain values (optimiser and
    scheduler states, :func:`capture_random_state`, positions); containers come back as plain
    ones, tensors on the CPU. The file is written and synced beside its place, renamed, and
    only then named in ``checkpoints/index.json`` with its SHA-256; older ones are deleted
    last. Whatever moment the process dies at, the newest complete checkpoint loads.

    Writes nothing where ``run.writes`` is False. Returns the file, or then its folder.

    Raises PosefabricError when the disk is full (earlier checkpoints stay) or when a value
    is of a kind that could not be loaded without running code.
    """
    if keep < 1:
        raise PosefabricError(f"keep={keep}: at least one checkpoint must be kept")
    folder = run.checkpoints_dir
    if not run.writes:
        return folder
    remove_temporaries(folder)
    buffer = io.BytesIO()
    torch.save(_loadable(state, "state"), buffer)
    data = buffer.getbuffer()
    digest = hashlib.sha256(data).hexdigest()
    # The digest in the name keeps a second save of one step from touching the first file.
    name = f"step-{step:08d}-{digest[:16]}.pt"
    write_atomic(folder / name, data)
    entries = [entry for entry in _entries(folder) if entry["step"] != step]
    entries.append({"file": name, "step": step, "sha256": digest, "bytes": len(data)})
    while len(entries) > keep:
        # After a damaged newest file, the step beyond this one is the damaged one.
        ahead = [entry for entry in entries[:-1] if entry["step"] > step]
        entries.remove(ahead[0] if ahead else entries[0])
    index = {"format_version": FORMAT_VERSION, "checkpoints": entries}
    write_atomic(folder / INDEX_NAME, json.dumps(index, indent=1).encode() + b"\n")
    kept = {entry["file"] for entry in entries}
    for file in folder.iterdir():
        if _FILE_NAME.fullmatch(file.name) and file.name not in kept:
            file.unlink(missing_ok=True)
    return folder / name


def load_checkpoint(run: RunFolder) -> tuple[dict[str, Any], int] | None:
    """The newest intact checkpoint as (state, step), tensors on the CPU; None without any.

    A file that does not match its checksum is passed over with a warning and the one before
    it is used. Raises PosefabricError when there are checkpoints but none is intact.
    """
    folder = run.checkpoints_dir
    entries = _entries(folder)
    problems = []
    for entry in reversed(entries):
        path = folder / entry["file"]
        try:
            data = path.read_bytes()
            if not hashlib.sha256(data).hexdigest().startswith(entry["sha256"]):
                raise ValueError(f"{len(data)} bytes that do not match its checksum")
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever is wrong with this file, another may be whole
            problems.append(f"{path.name}: {error}")
            logger.warning("%s: damaged checkpoint passed over (%s)", path, error)
            continue
        if problems:
            logger.warning("%s: going on from step %d instead", path, entry["step"])
        return state, entry["step"]
    if problems:
        raise PosefabricError(
            f"{folder}: none of the {len(problems)} checkpoints is intact ({'; '.join(problems)}); "
            f"restore them from a copy, or delete this folder to start at step 0"
        )
    return None


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Checkpoints in the order they were saved, by the index or, without it, by file names."""
    if not folder.is_dir():
        return []
    path = folder / INDEX_NAME
    try:
        return [
            {"file": str(e["file"]), "step": int(e["step"]), "sha256": str(e["sha256"])} | e
            for e in json.loads(path.read_bytes())["checkpoints"]
        ]
    except FileNotFoundError:
        pass
    except OSError as error:
        raise PosefabricError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s: damaged (%s); the checkpoints are taken by name", path, error)
    matches = [_FILE_NAME.fullmatch(file.name) for file in folder.iterdir()]
    return sorted(
        ({"file": m[0], "step": int(m[1]), "sha256": m[2]} for m in matches if m),
        key=lambda entry: ((folder / entry["file"]).stat().st_mtime_ns, entry["step"]),
    )


def _loadable(value: Any, where: str) -> Any:
    """A copy of a state that ``torch.load(weights_only=True)`` reads; names what it cannot."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        # torch.save writes the whole storage, also for a small view of it.
        whole = value.untyped_storage().nbytes() <= value.nbytes
        return value if whole else value.clone()
    if isinstance(value, np.bool_ | np.number):
        return value.item()
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        copy = {
            _loadable(key, f"{where} key"): _loadable(item, f"{where}[{key!r}]")
            for key, item in value.items()
        }
        return Counter(copy) if isinstance(value, Counter) else copy
    if type(value) in (list, tuple):
        return type(value)(_loadable(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise PosefabricError(
        f"{where}: a checkpoint holds tensors, numbers, strings, None, dicts, lists and tuples, "
        f"got {type(value).__name__}; convert it first (an array with torch.from_numpy)"
    )


def capture_random_state(generators: Mapping[str, Generator] | None = None) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators and of named ones.

    Tensors and plain values only. CUDA's generators are in it when CUDA is in use.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "torch": torch.get_rng_state(),
        "named": {name: _state_of(generator) for name, generator in (generators or {}).items()},
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(
    state: Mapping[str, Any], generators: Mapping[str, Generator] | None = None
) -> None:
    """Set all generators as :func:`capture_random_state` found them.

    Raises PosefabricError when the named generators are not those that were captured.
    """
    generators = generators or {}
    if set(generators) != set(state["named"]):
        raise PosefabricError(
            f"checkpoint: holds the random generators {sorted(state['named'])}, this run has "
            f"{sorted(generators)}; go on with the version and options that wrote it"
        )
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (
            numpy_state["kind"],
            numpy_state["keys"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["gauss"],
        )
    )
    torch.set_rng_state(state["torch"])
    cuda = state.get("cuda")
    if cuda is not None and torch.cuda.is_available():
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        else:
            logger.warning("checkpoint: made with %d GPUs, their random states are lost", len(cuda))
    for name, generator in generators.items():
        _restore(name, generator, state["named"][name])


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _arrays_to_tensors(generator.bit_generator.state)
    return generator.getstate()


def _restore(name: str, generator: Generator, state: Any) -> None:
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = _tensors_to_arrays(state)
        else:
            generator.setstate(state)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise PosefabricError(
            f"checkpoint: the state of random generator {name} does not fit a "
            f"{type(generator).__name__}: {error}"
        ) from error


def _arrays_to_tensors(value: Any) -> Any:
    """uint32 and uint64 words as int64 of the same bits, which every torch version stores."""
    if isinstance(value, Mapping):
        return {key: _arrays_to_tensors(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        words = torch.from_numpy(value.astype(np.uint64).view(np.int64))
        return {"words": words, "dtype": str(value.dtype)}
    return value


def _tensors_to_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"words", "dtype"}:
            return value["words"].numpy().view(np.uint64).astype(value["dtype"])
        return {key: _tensors_to_arrays(item) for key, item in value.items()}
    return value
