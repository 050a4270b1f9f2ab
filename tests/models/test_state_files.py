"""State dicts in files: wrappers, prefixes, numpy numbers, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posefabric.models.state_files import WRAPPERS, read_state
from posefabric.structures import PosefabricError

STATE = {"a.weight": torch.arange(3.0), "module.b": torch.ones(1)}


def load(folder: Path, content: Any) -> dict[str, torch.Tensor]:
    torch.save(content, folder / "x.tar")
    return read_state(folder / "x.tar")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_come_off_one_after_another(tmp_path: Path, wrapper: str) -> None:
    found = load(tmp_path, {"epoch": 1, "net": {wrapper: STATE}, "optimizer": {"x": STATE}})
    assert found.keys() == STATE.keys() and torch.equal(found["a.weight"], STATE["a.weight"])


def test_a_prefix_comes_off_when_all_have_it(tmp_path: Path) -> None:
    assert load(tmp_path, STATE).keys() == STATE.keys()
    parallel = {f"module.{name}": value for name, value in STATE.items()}
    assert load(tmp_path, parallel).keys() == STATE.keys()


def test_numpy_numbers_may_be_there(tmp_path: Path) -> None:
    extras = {"perf": np.float64(0.5), "best": np.float32(1), "step": np.int64(3)}
    assert load(tmp_path, {"state_dict": STATE, **extras}).keys() == STATE.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "one under state_dict, .*got epoch"),
        ({"first": STATE, "second": STATE}, "got first, second"),
        ({"state_dict": {}}, "got nothing"),
        ([1, 2], "holds a list, expected a state dict"),
        (
            {"state_dict": STATE, "args": argparse.Namespace(gpu=0)},
            r"not a readable weights file: it needs the pickled code of argparse\.Namespace, which "
            r"is not run; .*save its tensors alone",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(PosefabricError, match=rf"x\.tar: .*{message}"):
        load(tmp_path, content)


def test_a_missing_file_names_the_option() -> None:
    with pytest.raises(PosefabricError, match=r"checkpoint=nowhere\.tar: no such file"):
        read_state(Path("nowhere.tar"), option="checkpoint")
