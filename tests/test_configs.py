"""Every shipped configuration is whole and holds nothing of somebody's machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from posefabric.config import load_config, shipped_configs
from posefabric.data.pipeline import make_codec
from posefabric.models.build import make_head, make_shape
from posefabric.skeletons import load_skeleton
from posefabric.space.operations import OPERATIONS
from posefabric.space.parts import choose_parts

NAMES = sorted(shipped_configs())


def test_there_are_some() -> None:
    assert "demo" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_configuration(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert shipped_configs()[name].read_text().startswith("#"), "what it is for, first"
    assert config.data.root is None and config.data.boxes is None
    assert config.device == "auto" and config.threads is None
    assert config.search.loss == config.finetune.loss, "a network's outputs stay what they are"
    skeleton = load_skeleton(config.data.skeleton)
    parts = choose_parts(skeleton, config.model.parts)
    assert {k for p in parts.values() for k in p} == set(range(skeleton.num_keypoints))
    assert set(config.model.operations) <= set(OPERATIONS)
    assert make_shape(config).places and make_codec(config.data) and make_head(config)


def test_they_are_in_the_wheel() -> None:
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("needs the checkout")
    data = (root / "pyproject.toml").read_text()
    assert '"configs/*.yaml"' in data and '"configs/paper/*.yaml"' in data
    assert '"configs/study/*.yaml"' in data
