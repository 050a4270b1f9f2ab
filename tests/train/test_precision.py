"""What precision an option comes to on a device."""

from __future__ import annotations

import logging

import pytest
import torch

from posefabric.train import precision
from posefabric.train.precision import has_bf16, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("able", [True, False])
def test_auto_is_bf16_only_where_the_device_computes_in_it(
    able: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: able)
    assert resolve_precision("auto", CPU) == ("bf16" if able else "fp32")
    assert resolve_precision("fp32", CPU) == "fp32"
    assert not caplog.records


def test_bf16_by_name_is_obeyed_and_warned_of_where_it_is_emulated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    with caplog.at_level(logging.WARNING):
        assert resolve_precision("bf16", CPU) == "bf16"
    assert "precision=auto" in caplog.text


def test_has_bf16_follows_what_onednn_says_of_this_cpu() -> None:
    assert has_bf16(CPU) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not has_bf16(torch.device("meta"))
