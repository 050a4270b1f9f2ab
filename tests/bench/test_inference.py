"""The arms that predict, and what is shipped, on tiny networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bench_parts import ONE, TINY, FakeGate, inline, make_bench

from posefabric.bench import inference
from posefabric.bench.group_evaluation import (
    by_pycocotools,
    check_equal,
    crowd,
    oks_rounds,
)
from posefabric.bench.group_loader import MADE
from posefabric.bench.inference import (
    evaluation_rounds,
    forward_arm,
    forward_rounds,
    images_of,
    own_network,
)
from posefabric.bench.shipping import exported, random_compact, shipped_rounds
from posefabric.evaluate.oks import METRICS, oks_evaluate
from posefabric.structures import PosefabricError
from posefabric.train.precision import resolve_precision

CPU = torch.device("cpu")


def test_a_forward_pass_has_its_layout_and_no_gradient() -> None:
    seen: list[tuple[bool, bool]] = []

    class Spy(torch.nn.Module):
        def forward(self, images):
            seen.append((images.is_contiguous(), torch.is_grad_enabled()))

    images = images_of(TINY.config(), 2, CPU)
    assert images.shape == (2, 3, 64, 64)
    assert forward_arm(Spy(), images)() > 0
    assert forward_arm(Spy(), images, channels_last=False)() > 0
    assert seen == [(False, False), (True, False)]


def test_forward_passes_of_the_mixture_the_yardstick_and_a_peer() -> None:
    config = TINY.config()
    peer = TINY.config("model.network=simple_baseline", "model.deconv_width=8")
    configs = {"ours": config, "theirs": config, "peer": peer}
    found = inline(forward_rounds, configs=configs, batch=2, device="cpu", plan=ONE)
    assert list(found["took"]) == ["ours", "theirs", "peer"]
    assert found["precision"] == resolve_precision("auto", CPU)
    assert all(len(values) == 1 and values[0] > 0 for values in found["took"].values())


def test_ours_is_laid_out_as_a_training_does() -> None:
    network = own_network(TINY.config(), CPU)
    weights = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert weights and not network.training
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_a_data_set_is_predicted_by_both(tmp_path) -> None:
    bench = make_bench(tmp_path)
    config = TINY.config(f"data.root={bench.pictures('coco17')}", *MADE)
    found = inline(evaluation_rounds, config=config, persons=2, batch=2, plan=ONE)
    assert found["persons"] == 2 and set(found["took"]) == {"ours", "theirs"}


def test_oks_is_compared_only_where_it_is_equal() -> None:
    pytest.importorskip("pycocotools")
    dataset, predictions = crowd(30)
    ours = oks_evaluate(dataset, predictions, nms_threshold=None)
    numbers = [ours[name] for name in METRICS]
    check_equal(numbers, by_pycocotools(dataset, predictions))
    assert 0.05 < ours["AP"] < 0.95  # a comparison of zeros says nothing
    with pytest.raises(PosefabricError, match="AP50 is"):
        check_equal([numbers[0], numbers[1] + 1e-6, *numbers[2:]], numbers)
    took = inline(oks_rounds, persons=10, plan=ONE)
    assert all(math.isfinite(took[arm][0]) for arm in ("ours", "theirs"))


def test_the_compact_network_is_one_operation_an_edge() -> None:
    graph = random_compact(TINY.config()).architecture()
    cells = [cell for part in graph.parts for cell in part.cells]
    assert cells and all(len(edge.choices) == 1 for cell in cells for edge in cell.edges)
    assert all(len(cell.sources) <= 1 for cell in cells)
    again = random_compact(TINY.config()).architecture()
    assert again == graph


def test_runtimes_take_crops_and_the_eager_arms_images(tmp_path, monkeypatch) -> None:
    given: list[tuple[str, tuple[int, ...], np.dtype, int]] = []

    def runner(path, threads):
        return lambda crops: given.append((path.name, crops.shape, crops.dtype, threads))

    monkeypatch.setattr(inference, "RUNNERS", {"fake": runner})
    gate = FakeGate(turns=3)
    shipped_rounds(
        gate,  # type: ignore[arg-type]
        config=TINY.config(),
        files={"ours": tmp_path / "ours.onnx", "peer": tmp_path / "peer.onnx"},
        runtimes=("fake",),
        batches=(1, 2),
        plan=ONE,
    )
    one, two = gate.answers
    assert list(one) == list(two) == ["mixture", "compact", "ours@fake", "peer@fake"]
    shapes = [(name, shape) for name, shape, _, _ in given]
    assert sorted(shapes) == sorted(
        (f"{name}.onnx", (batch, 64, 64, 3)) for name in ("ours", "peer") for batch in (1, 2)
    )
    assert {(kind, threads) for _, _, kind, threads in given} == {
        (np.dtype("uint8"), torch.get_num_threads())
    }


@pytest.mark.slow
def test_what_is_exported_runs_in_onnxruntime(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "ours.onnx"
    inline(exported, config=TINY.config(), path=path)
    crops = np.zeros((3, 64, 64, 3), np.uint8)
    assert inference.runtime_arm("onnxruntime", path, crops, threads=1)() > 0
