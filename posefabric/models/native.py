"""Compiles the fast path's CPU kernels with the machine's own compiler, once, and loads them.

``kernels.cpp`` needs a C++ compiler and nothing of torch. What is compiled is kept in the user's
cache folder, by the source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from posefabric.structures import PosefabricError

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno")
SECONDS = 300

_P, _I, _D = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_double
SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "depthwise": ([_P] * 3 + [_I] * 12, None),
    "depthwise_weight": ([_P] * 3 + [_I] * 11, None),
    "statistics": ([_P, _I, _I, _P, _P, _P, _P, _D, _D, _P], None),
    "mix": ([_I, _P, _P, _P, _P, _I, _I, _I, _P], None),
    "mix_backward": ([_P] * 6 + [_I, _D, _I, _I, _I, _P, _P, _P], _D),
}


@dataclass(frozen=True)
class Kernels:
    """The compiled functions, or why there are none."""

    library: ctypes.CDLL | None
    reason: str = ""


@functools.cache
def load_kernels() -> Kernels:
    """The kernels of this machine; compiles them the first time (seconds).

    The caller says ``reason`` to the user where there is no compiler.
    """
    compiler = _compiler()
    if compiler is None:
        return Kernels(None, "no C++ compiler (install g++ or clang, or set CXX)")
    try:
        path = compile_kernels(compiler, cache_folder())
        return Kernels(_declare(ctypes.CDLL(str(path))))
    except (PosefabricError, OSError, AttributeError) as error:
        return Kernels(None, str(error))


def cache_folder() -> Path:
    """Where compiled kernels are kept: in ``XDG_CACHE_HOME`` or ``~/.cache``, under our name."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posefabric"


def compile_kernels(compiler: list[str], folder: Path) -> Path:
    """The shared library in ``folder``, compiled unless it is there. Raises PosefabricError."""
    target = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [*compiler, *FLAGS, target]
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update("\0".join([*command, platform.machine(), _processor()]).encode())
    library = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        # Under a name of its own first: another process may be compiling too.
        found = Path(made) / library.name
        try:
            done = subprocess.run(
                [*command, "-o", str(found), str(SOURCE)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PosefabricError(f"{compiler[0]} did not compile the kernels: {error}") from error
        if done.returncode:
            raise PosefabricError(
                f"{compiler[0]} did not compile {SOURCE.name}: {done.stderr.strip()[-500:]}"
            )
        found.replace(library)
    return library


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


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (arguments, result) in SIGNATURES.items():
        for suffix in ("f32", "f64"):
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, result
    return library
