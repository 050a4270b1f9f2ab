"""Compiles a C++ file of the package with the machine's own compiler, once.

What is compiled is kept in the user's cache folder, by the source, the compiler and the processor.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from posefabric.structures import PosefabricError

COMMON = ("-std=c++17", "-fPIC", "-shared")
SECONDS = 300


def cache_folder() -> Path:
    """Where compiled kernels are kept: in ``XDG_CACHE_HOME`` or ``~/.cache``, under our name."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posefabric"


def compile_library(source: Path, options: Sequence[str], *, built_for: str = "") -> Path:
    """The shared library of a C++ file, in :func:`cache_folder`; compiled unless it is there.

    Args:
        options: of the compiler, after the source's name, so that libraries can be among them.
        built_for: what else it depends on, such as a version of what it is linked with.

    Raises PosefabricError where there is no compiler, or with what the compiler said.
    """
    compiler, folder = _compiler(), cache_folder()
    if compiler is None:
        raise PosefabricError("no C++ compiler (install g++ or clang, or set CXX)")
    key = hashlib.sha256(_whole(source))
    known = [*compiler, *COMMON, *options, built_for, platform.machine(), _processor()]
    key.update("\0".join(known).encode())
    library = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        # Under a name of its own first: another process may be compiling too.
        found = Path(made) / library.name
        try:
            done = subprocess.run(
                [*compiler, str(source), *COMMON, *options, "-o", str(found)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PosefabricError(
                f"{compiler[0]} did not compile {source.name}: {error}"
            ) from error
        if done.returncode:
            raise PosefabricError(
                f"{compiler[0]} did not compile {source.name}: {done.stderr.strip()[-500:]}"
            )
        found.replace(library)
    return library


def _whole(source: Path) -> bytes:
    """A C++ file and the package's own headers, which lie beside it."""
    headers = sorted(source.parent.glob("*.h"))
    return b"\0".join(file.read_bytes() for file in (source, *headers))


def _compiler() -> list[str] | None:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    return next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
