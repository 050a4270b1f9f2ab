"""What is measured is what was agreed on, by the package's own defaults."""

from __future__ import annotations

import pytest

from posefabric.bench.subjects import PEERS, SHIPPED, SUBJECTS
from posefabric.config import load_config


def test_the_two_searches_have_their_sizes() -> None:
    resnet, lite = (subject.config() for subject in SUBJECTS)
    assert resnet.model.backbone == "posenfs_resnet50" and resnet.data.input_wh == (192, 256)
    assert resnet.model.parts == 3 and resnet.model.channel_factor == 10
    assert lite.model.backbone == "tf_efficientnet_lite0" and lite.data.input_wh == (128, 128)
    assert lite.model.parts == 5
    assert [subject.name for subject in SUBJECTS] == [
        "resnet50_cnf3_256x192",
        "lite0_p5_128x128",
    ]


@pytest.mark.parametrize("subject", [*SUBJECTS, SHIPPED], ids=lambda s: s.name)
def test_ours_leaves_every_other_model_option_as_shipped(subject) -> None:
    config, shipped = subject.config(), load_config(subject.base)
    said = {"weights", "faithful", *(o.split(".")[1].split("=")[0] for o in subject.overrides)}
    for option in type(config.model).model_fields:
        if option not in said:
            assert getattr(config.model, option) == getattr(shipped.model, option), option
    assert config.model.faithful is False and config.model.weights == "none"
    assert config.search.precision == config.finetune.precision == "auto"
    assert subject.images(quick=False) == subject.batch
    assert subject.images(quick=True) == subject.quick_batch <= subject.batch


def test_peers_have_the_same_input_and_loss() -> None:
    for subject in SUBJECTS:
        for name in PEERS:
            peer, own = subject.peer(name), subject.config()
            assert peer.model.network != "fabric" and peer.data.input_wh == own.data.input_wh
            assert peer.finetune.loss == own.search.loss
    assert SUBJECTS[0].peer("hrnet_w32").model.backbone == "hrnet_w32"
