"""The oracle: all architectures of a small space, each trained once, and searches held to it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import command, make_supernet

from posefabric.derive.prune import prune
from posefabric.models.supernet import Supernet
from posefabric.search.closing import Choice
from posefabric.structures import PosefabricError
from posefabric.study.oracle import _verdict
from posefabric.study.paths import fused, likeliest, one_path
from posefabric.study.rows import read_rows

WHOLE = {"all": (0, 1, 2, 3)}
REAL = ("zero", "skip", "sep_conv_3x3", "dil_conv_3x3", "sep_conv_5x5")


def mixture(**changes: Any) -> Supernet:
    network = make_supernet(**{"operations": REAL, "parts": WHOLE, **changes})
    with torch.no_grad():
        for parameter in network.arch_parameters().values():
            parameter.zero_()
    return network


def test_a_part_of_three_layers_and_four_operations_has_52_paths() -> None:
    network = mixture()
    found = one_path(network)
    assert len(found) == 52 and len({one.name for one in found}) == 52
    # By hand: 2 + 3 sources lead to (0, 0), 2 + 3 + 3 to (1, 0), and 5 + 8 is 13.
    assert {one.name.split()[1] for one in found if "skip" in one.name} >= {
        "1/4>1/4>1/4>1/4",
        "1/32>1/16>1/8>1/4",
    }
    digests = set()
    for one in found:
        own = mixture()
        one.leave_only(own)
        graph = prune(own.architecture())
        (part,) = graph.parts
        assert [cell.layer for cell in part.cells] == [3, 4, 5]
        assert all(len(cell.sources) == len(cell.edges[0].choices) == 1 for cell in part.cells)
        assert one.name.startswith(part.cells[0].edges[0].choices[0].operation)
        digests.add(graph.digest())
    assert len(digests) == 52
    state = network.state_dict()
    fresh = mixture().state_dict()
    assert all(torch.equal(state[name], fresh[name]) for name in state), "left as it was"


def test_fused_ones_are_spread_over_their_cost() -> None:
    network = mixture()
    found = fused(network, 20, seed=0)
    assert len(found) == 20 and len({one.macs for one in found}) == 20
    again = fused(network, 20, seed=0)
    assert [one.kept for one in found] == [one.kept for one in again]
    costs = sorted(one.macs for one in found)
    assert costs[-1] > 1.05 * costs[0]
    assert max(len(kept) for one in found for kept in one.kept.values()) > 1
    assert fused(network, 0, seed=0) == [], "as the command has it by default"


def test_a_probability_is_that_of_its_choices() -> None:
    network = mixture()
    part, candidates = "all", one_path(network)
    with torch.no_grad():
        network.alphas[part][0, 0, 2] = 3.0
        for row in range(len(network.betas[part])):
            slots = Choice(part, row).open_options(network)
            network.betas[part][row, slots[-1]] = 2.0
    best = likeliest(network, candidates)
    scores = {one.name: one.log_likelihood(network) for one in candidates}
    assert best.name == max(scores, key=lambda name: scores[name])
    assert best.name.startswith("sep_conv_3x3")
    total = sum(math.exp(score) for score in scores.values())
    zero = float(network.probabilities(part)[0][0, 0, 0].detach())
    assert total == pytest.approx(1 - zero, rel=1e-5), "paths share what zero leaves"


def test_more_than_one_part_is_refused() -> None:
    with pytest.raises(PosefabricError, match=r"model\.parts=1"):
        one_path(make_supernet())


def test_an_order_is_told_from_none() -> None:
    truth = np.arange(20) / 20
    verdict = _verdict("a", list(truth**2), truth)
    assert verdict.effect == pytest.approx(1) and verdict.holds and verdict.p is not None
    opposite = _verdict("b", list(-truth), truth)
    assert opposite.effect == pytest.approx(-1) and not opposite.holds
    assert _verdict("c", [1.0] * 20, truth).holds is None


def test_the_oracle_from_the_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "oracle"
    small = [
        "data.input_wh=[64,64]", "data.synthetic_train=16", "data.synthetic_val=8",
        "model.backbone=test_efficientnet", "model.weights=none", "model.channel_factor=1",
        "model.parts=1", "model.first_layer=4", "model.operations=[zero,dil_conv_3x3]",
        "search.epochs=1", "search.batch_size=8", "search.worth_persons=8",
        "search.relaxation=softmax",
        "derive.threshold=0", "derive.operations_kept=null", "derive.sources_kept=null",
        "derive.gap_persons=8", "finetune.epochs=0.5", "finetune.batch_size=8",
    ]  # fmt: skip
    words = ["oracle", "demo", *small, "--out", out, "--fused", 1]
    assert command(monkeypatch, *words) == 0
    rows = read_rows(out / "rows.jsonl")
    assert len(rows) == 5 + 1 and all(0 <= row["PCK"] <= 1 for row in rows.values())
    assert not [path for path in out.iterdir() if path.name in rows], "trainings are cleared away"
    verdicts = json.loads((out / "verdicts.json").read_text())
    assert [set(v) for v in verdicts] == [{"claim", "effect", "interval", "p", "holds"}] * 2
    page = (out / "oracle.md").read_text()
    assert "of 5 |" in page and "fused 1" in page
    assert "'model.operations=[zero,dil_conv_3x3]'" in page, "as a shell reads it"
    capsys.readouterr()
    assert command(monkeypatch, *words) == 0
    assert "[1/6]" not in capsys.readouterr().out, "what is trained is not trained again"
