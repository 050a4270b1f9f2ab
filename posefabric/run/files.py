"""Files that are whole or not there at all, and what to say when one cannot be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from posefabric.structures import PosefabricError

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file: temporary file in the same folder, fsync, rename.

    Raises PosefabricError when the disk is full or the place not writable; then the old file
    is as it was and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            write_all(file.fileno(), data)
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error, len(data)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: bytes) -> None:
    """Append a line (with its end) that is in the file when this returns, whole or not at all.

    What a killed writer left after the last line end goes first. Raises PosefabricError when
    the disk is full or the file not writable; then it is as it was.
    """
    try:
        with path.open("ab+", buffering=0) as opened:
            file = cast(BinaryIO, opened)
            end = _cut_torn_line(file)
            try:
                write_all(file.fileno(), line)
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise write_error(path, error, len(line)) from error


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """A system write may take only a part; go on until all is written or it fails."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(descriptor, view) :]


def write_error(path: Path, error: OSError, needed: int) -> PosefabricError:
    """What to tell the user about a failed write of ``needed`` bytes."""
    if error.errno in _FULL:
        return PosefabricError(
            f"{path}: the disk is full (needed {needed} bytes: {error.strerror}); free space and "
            f"run again with --resume; the last checkpoint is intact"
        )
    return PosefabricError(
        f"{path}: cannot be written ({error.strerror}); expected a place you may write to; "
        f"choose another --out"
    )


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed writer left in a folder; only for the process that writes there."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(entry.name):
            entry.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that :func:`write_atomic` has not renamed yet."""
    return name.startswith(".") and name.endswith(".tmp")


def json_bytes(value: Any, *, indent: int | None = 1) -> bytes:
    """JSON and a line end of plain values, paths, numpy and torch scalars and arrays.

    What is not finite becomes null, since JSON has no word for it.
    """
    try:
        text = json.dumps(value, indent=indent, default=_plain, allow_nan=False)
    except ValueError:
        plain = json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)
        text = json.dumps(plain, indent=indent)
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    """numpy and torch values as JSON, without importing either."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _cut_torn_line(file: BinaryIO) -> int:
    """Drop what a killed writer left after the last line end; the size of the file then."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        size = file.read().rfind(b"\n") + 1
        file.truncate(size)
    return size


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
