"""What precision an option comes to on a device."""

from __future__ import annotations

import logging

import pytest
import torch

from posefabric.structures import PosefabricError
from posefabric.train import precision
from posefabric.train.precision import (
    FIRST_SCALE,
    autocast,
    has_bf16,
    make_scaler,
    resolve_precision,
)

CPU = torch.device("cpu")
GPU = torch.device("cuda")


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


def test_fp16_is_for_gpus_alone() -> None:
    with pytest.raises(PosefabricError, match=r"precision=fp16: needs a GPU.*cpu.*precision=fp32"):
        resolve_precision("fp16", CPU)
    assert resolve_precision("fp16", GPU) == "fp16"


def test_the_forward_pass_runs_in_what_was_resolved() -> None:
    x = torch.ones(2, 2)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(CPU, name):  # type: ignore[arg-type]
            assert (x @ x).dtype == dtype


def test_only_fp16_scales_its_loss() -> None:
    assert not make_scaler(CPU, "fp32").is_enabled() and not make_scaler(CPU, "bf16").is_enabled()
    scaler = make_scaler(CPU, "fp16")
    assert scaler.scale(torch.tensor(1.0)).item() == FIRST_SCALE
