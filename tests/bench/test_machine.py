"""The machine is described."""

from __future__ import annotations

import json

import torch

from posefabric.bench import machine
from posefabric.bench.machine import describe_machine, instruction_sets, usable_cores


def test_the_description_is_json_and_complete() -> None:
    found = json.loads(json.dumps(describe_machine()))
    assert {"cpu", "cores", "threads", "instruction_sets", "memory_bytes", "device", "date"} <= set(
        found
    )
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0] or found["packages"]
    assert found["threads"] == torch.get_num_threads() and found["cores"] == usable_cores() >= 1
    assert "onnxruntime" in found["packages"]


def test_instruction_sets_are_those_that_matter() -> None:
    lines = ["model name\t: x", "flags\t\t: fpu sse4_2 avx2 avx512_bf16 avx ht fma", "flags\t: amx"]
    assert instruction_sets(lines) == ["avx", "avx2", "avx512_bf16", "fma", "sse4_2"]
    assert instruction_sets(["Features\t: fp asimd bf16"]) == ["asimd", "bf16"]
    assert instruction_sets([]) == []


def test_a_gpu_is_named(monkeypatch) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "get_device_name", lambda index: "a GPU")
    assert describe_machine()["device"] == "a GPU"
