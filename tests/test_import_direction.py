"""Imports go one way, as DESIGN.md says, and importing posefabric does nothing else."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import posefabric

ROOT = Path(posefabric.__file__).parent
# What stands right may import what stands left; the stages of one entry know nothing of
# each other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("structures", "budget"),
    ("native",),
    ("section",),
    ("options", "options_data"),
    ("config",),
    ("run", "distributed", "skeletons"),
    ("data", "space"),
    ("models",),
    ("evaluate",),
    ("train",),
    ("derive",),
    ("search",),
    ("deploy",),
    ("study", "bench"),
    ("cli_output",),
    ("cli_bench", "cli_data", "cli_posenfs", "cli_study", "cli_train"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
TORCH_FREE = (
    "posefabric",
    "posefabric.structures",
    "posefabric.config",
    "posefabric.run",
    "posefabric.distributed",
    "posefabric.skeletons",
    "posefabric.data.coco",
    "posefabric.data.image",
    "posefabric.data.crop",
    "posefabric.space.architecture",
    "posefabric.cli",
    "posefabric.deploy.onnx_predictor",
    "posefabric.deploy.openvino_predictor",
)

FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    pieces = ("posefabric", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also inside functions; not those only for types."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    pending: list[ast.AST] = [ast.parse(path.read_text(), str(path))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES else base
        pending += ast.iter_child_nodes(node)


def stage(module: str) -> str | None:
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "posefabric" and len(pieces) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = stage(module_name(path))
    found = {stage(module) for module in imported(path)} & (set(LEVEL) | {None})
    if own is None:
        assert found == {None} or not found, "the package itself imports no stage"
        return
    assert own in LEVEL, f"{own} has no place in DESIGN.md's order"
    for other in found - {None, own}:
        assert other is not None
        assert LEVEL[other] < LEVEL[own], f"{module_name(path)} imports {other}"


def test_no_two_files_import_each_other() -> None:
    graph = {
        name: {m for m in imported(path) if m in MODULES and m != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_no_import_reaches_into_the_tests_or_up() -> None:
    for path in FILES:
        for module in imported(path):
            assert module.split(".")[0] not in ("tests", "conftest", "networks", "trainings"), path


def python(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_importing_posefabric_does_nothing_else(tmp_path: Path) -> None:
    code = """
import logging, os, signal, sys, threading
before = set(sys.modules), dict(os.environ), threading.active_count(), list(logging.root.handlers)
handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
import posefabric
assert dict(os.environ) == before[1] and threading.active_count() == before[2]
assert logging.root.handlers == before[3]
assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
print(posefabric.__version__, sorted(set(sys.modules) - before[0]))
"""
    assert python(code, tmp_path) == f"{posefabric.__version__} ['posefabric']\n"
    assert list(tmp_path.iterdir()) == []


def test_what_needs_no_torch_does_not_import_it(tmp_path: Path) -> None:
    code = f"""
import importlib, sys
for name in {TORCH_FREE!r}:
    importlib.import_module(name)
    heavy = {{"torch", "timm", "torchvision"}} & set(sys.modules)
    assert not heavy, (name, heavy)
print("light")
"""
    assert python(code, tmp_path) == "light\n"
