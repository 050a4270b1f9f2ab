"""State dicts that others saved: read without running pickled code, and unwrapped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posefabric.structures import PosefabricError

# Keys under which trainers keep a state dict, what is best to use first.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "best_state_dict",
    "network",
    "net",
    "weights",
)


def read_state(path: Path, *, option: str = "model.weights") -> dict[str, Tensor]:
    """A state dict from .safetensors, or from any ``torch.save`` file (.pth, .tar, ...).

    Wrappers (``state_dict``, ``model``, ...) and the prefix ``module.`` of DataParallel are
    taken off. No pickled code is run: a file that needs more than tensors and plain values is
    refused. ``option`` is what an error calls the place the path came from.

    Raises PosefabricError when the file is missing, not readable, needs pickled code, or holds
    no state dict.
    """
    if not path.is_file():
        raise PosefabricError(
            f"{option}={path}: no such file; expected a state dict in .safetensors, .pth or .tar"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with _numpy_numbers():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PosefabricError(_refusal(path, error)) from error
    found = _unwrapped(content, path)
    state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not state:
        raise PosefabricError(f"{path}: holds no tensors, expected a state dict")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise PosefabricError(
            f"{path}: not a readable weights file ({type(error).__name__}: {error}); expected "
            f"safetensors"
        ) from error


def _numpy_numbers() -> AbstractContextManager[Any]:
    """Lets a file hold numpy numbers, as a best accuracy often is; they run nothing."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4", "b1")]
    # Files of numpy 1 call the same function by its old place.
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    allowed: list[Any] = [np.dtype, *kinds, *((scalar, name) for name in names)]
    return torch.serialization.safe_globals(allowed)


def _refusal(path: Path, error: Exception) -> str:
    needed = re.search(r"GLOBAL ([\w.]+)", str(error))
    if needed is not None:
        return (
            f"{path}: not a readable weights file: it needs the pickled code of {needed[1]}, which "
            f"is not run; where you trust the file, save its tensors alone once: "
            f"torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW_PATH)"
        )
    return (
        f"{path}: not a readable weights file ({type(error).__name__}); expected a state dict in "
        f".safetensors, or saved by torch without pickled objects"
    )


def _unwrapped(content: Any, path: Path) -> Mapping[Any, Any]:
    """The mapping that holds the tensors, down through any wrappers."""
    while True:
        if not isinstance(content, Mapping):
            raise PosefabricError(
                f"{path}: holds a {type(content).__name__}, expected a state dict"
            )
        inner = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if inner:
            content = content[inner[0]]
            continue
        if any(isinstance(value, Tensor) for value in content.values()):
            return content
        # Another wrapper's name will do when there is no doubt what is meant.
        inner = [key for key, value in content.items() if _has_tensors(value)]
        if len(inner) != 1:
            raise PosefabricError(
                f"{path}: expected a state dict, or one under {', '.join(WRAPPERS)}; got "
                f"{', '.join(map(str, list(content)[:8])) or 'nothing'}"
            )
        content = content[inner[0]]


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
