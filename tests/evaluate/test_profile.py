"""Costs against sums done by hand and published figures; no absolute time is asserted."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import Tensor, nn

from posefabric.evaluate.profile import compare, count_macs, count_parameters, profile
from posefabric.structures import PosefabricError


class _Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.stem(images)]


class _Network(nn.Module):
    """Backbone 3x3 stride 4 to 8 channels, head 1x1 to 5 maps."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.head = nn.Conv2d(8, 5, 1)

    def head_forward(self, levels: list[Tensor]) -> Tensor:
        return self.head(levels[0])

    def forward(self, images: Tensor) -> Tensor:
        return self.head_forward(self.backbone(images))


class _Slow(nn.Module):
    """No backbone; sleeps, so that its latency is known."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert images.is_contiguous(memory_format=torch.channels_last)
        time.sleep(self.seconds)
        return images


def test_counts_by_hand() -> None:
    result = profile(_Network(), (64, 32), batch_size=2, repeats=3)
    pixels = 16 * 8
    assert result["params"] == 3 * 9 * 8 + 8 * 5 + 5
    assert result["macs"] == pixels * (27 * 8 + 8 * 5)  # of one picture, whatever the batch
    assert result["head_params"] == 8 * 5 + 5
    assert result["head_macs"] == pixels * 8 * 5
    assert 0 < result["latency_ms_low"] <= result["latency_ms"] <= result["latency_ms_high"]
    assert 0 < result["head_latency_ms_low"] <= result["head_latency_ms"]
    assert (result["batch_size"], result["repeats"], result["input_wh"]) == (2, 3, [64, 32])
    json.dumps(result, allow_nan=False)


def test_published_figures_of_mobilenet_v2() -> None:
    """3.50 M parameters and 0.30 G multiply-adds at 224x224 (Sandler et al., table 4)."""
    timm = pytest.importorskip("posefabric.models.timm_import").import_timm()
    network = timm.create_model("mobilenetv2_100", pretrained=False).eval()
    with torch.no_grad():
        macs = count_macs(lambda: network(torch.zeros(1, 3, 224, 224)))
    assert macs / 1e9 == pytest.approx(0.300, abs=0.005)
    assert count_parameters(network) / 1e6 == pytest.approx(3.50, abs=0.01)


def test_shared_tensors_count_once() -> None:
    layer = nn.Linear(3, 4)
    tied = nn.Linear(3, 4, bias=False)
    tied.weight = layer.weight
    assert count_parameters(nn.ModuleList([layer, layer, tied])) == 16


def test_the_network_is_left_as_it_was() -> None:
    network = _Network().train()
    network.head.eval()
    strides = network.backbone.stem.weight.stride()
    threads = torch.get_num_threads()
    assert profile(network, (32, 32), repeats=1, threads=1)["threads"] == 1
    assert torch.get_num_threads() == threads
    assert network.training
    assert not network.head.training
    assert network.backbone.stem.weight.stride() == strides


def test_ratios_and_networks_without_backbone() -> None:
    results = compare({"fast": _Slow(0.002), "slow": _Slow(0.006)}, (32, 32), repeats=5, warmup=1)
    assert results["fast"]["latency_ratio"] == 1
    assert 1.5 < results["slow"]["latency_ratio"] < 6
    assert results["slow"]["head_macs"] is None
    assert results["slow"]["head_params"] is None
    assert results["slow"]["head_latency_ms"] is None
    assert results["slow"]["params"] == 0


def test_every_round_times_each_once_in_changing_order() -> None:
    seen: list[str] = []

    class _Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, images: Tensor) -> Tensor:
            seen.append(self.name)
            return images

    compare({name: _Noted(name) for name in "abc"}, (32, 32), repeats=3, warmup=0)
    assert "".join(seen[3:]) == "abcbcacab"  # the first three count multiply-adds


def test_options_are_checked() -> None:
    with pytest.raises(PosefabricError, match="at least one network"):
        compare({}, (32, 32))
    with pytest.raises(PosefabricError, match="repeats"):
        profile(_Network(), (32, 32), repeats=0)
