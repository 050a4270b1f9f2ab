"""Deriving a compact network changes its size, not what it computes."""

from __future__ import annotations

import pytest
import torch
from networks import EVERY, PLAIN, make_compact, make_supernet, shake

from posefabric.derive.fold import fold
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.supernet import Supernet

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))

CASES = {
    "plain": dict(relaxation="sparsemax"),
    "every operation": dict(relaxation="sparsemax", operations=EVERY),
    "three nodes": dict(relaxation="sparsemax", operations=EVERY, hidden_nodes=3),
    "alpha per cell": dict(relaxation="sparsemax", shared_alpha=False, hidden_nodes=2),
    "faithful": dict(relaxation="sparsemax", faithful=True, hidden_nodes=2, operations=EVERY),
    "vector head": dict(relaxation="sparsemax", head="vector"),
    "soft": dict(relaxation="softmax", operations=EVERY, hidden_nodes=2),
}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pruning_and_folding_keep_the_outputs(case: str, seed: int) -> None:
    mixture = make_supernet(seed=seed, **CASES[case])
    graph = prune(mixture.architecture())
    compact = make_compact(graph)
    shake(compact, seed + 100)
    transfer_weights(mixture, compact)
    compact.eval()
    folded = fold(compact)
    with torch.no_grad():
        expected = mixture(IMAGES)
        assert relative_difference(compact(IMAGES), expected) < 1e-5
        assert relative_difference(folded(IMAGES), expected) < 1e-5
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    names = [name for name, _ in compact.named_parameters()]
    assert not any("alpha" in name or "beta" in name for name in names)
    if mixture.relaxation == "sparsemax":
        assert sum(p.numel() for p in compact.head_parameters()) < 0.9 * sum(
            p.numel() for p in mixture.head_parameters()
        )


def force(
    mixture: Supernet, part: str, *, alpha: list[float], beta: dict[int, list[float]]
) -> None:
    with torch.no_grad():
        mixture.alphas[part].copy_(torch.tensor(alpha).expand_as(mixture.alphas[part]))
        for row, values in beta.items():
            mixture.betas[part][row] = torch.tensor(values)


def test_a_cell_of_zeros_becomes_its_constant_and_frees_what_fed_it() -> None:
    mixture = make_supernet(seed=4, relaxation="sparsemax", shared_alpha=False)
    with torch.no_grad():
        mixture.alphas["upper"].zero_()
        mixture.betas["upper"].zero_()
        mixture.alphas["upper"][4, 0] = torch.tensor([9.0, 0, 0, 0])
    graph = prune(mixture.architecture())
    cell = next(c for c in graph.parts[0].cells if (c.layer, c.scale) == (4, 1))
    assert cell.edges == () and cell.sources == ()
    compact = make_compact(graph)
    transfer_weights(mixture, compact)
    with torch.no_grad():
        assert relative_difference(fold(compact.eval())(IMAGES), mixture(IMAGES)) < 1e-5


def test_a_single_path_keeps_three_cells_and_cuts_the_backbone() -> None:
    mixture = make_supernet(seed=5, relaxation="sparsemax", parts={"all": (0, 1, 2, 3)})
    same = {row: [9.0, 0.0, 0.0] for row in range(6)}
    force(mixture, "all", alpha=[0.0, 0.0, 9.0, 0.0], beta=same)
    graph = prune(mixture.architecture())
    assert [(c.layer, c.scale) for c in graph.parts[0].cells] == [(3, 0), (4, 0), (5, 0)]
    assert len(graph.backbone.channels) == 1
    compact = make_compact(graph)
    transfer_weights(mixture, compact)
    deepest = mixture.backbone.body.blocks
    assert len(compact.backbone.body.blocks) < len(deepest)
    with torch.no_grad():
        assert relative_difference(compact.eval()(IMAGES), mixture(IMAGES)) < 1e-5


def test_border_copies_are_sources_like_any_other() -> None:
    """A faithful cell whose weight sits on the copy of a missing source must keep that source."""
    mixture = make_supernet(seed=6, relaxation="sparsemax", faithful=True, operations=PLAIN)
    force(mixture, "upper", alpha=[0, 1, 1, 1], beta={r: [0.0, 9.0, 0.0] for r in range(6)})
    graph = prune(mixture.architecture())
    finest = next(c for c in graph.parts[0].cells if (c.layer, c.scale) == (5, 0))
    assert [(s.kind, s.scale, s.slot) for s in finest.sources] == [("same", 0, 1)]
    compact = make_compact(graph)
    transfer_weights(mixture, compact)
    with torch.no_grad():
        assert relative_difference(compact.eval()(IMAGES), mixture(IMAGES)) < 1e-5


def test_folding_a_float64_network_is_exact() -> None:
    mixture = make_supernet(seed=8, relaxation="sparsemax", operations=EVERY, hidden_nodes=2)
    mixture.double()
    compact = make_compact(prune(mixture.architecture())).double()
    transfer_weights(mixture, compact)
    with torch.no_grad():
        images = IMAGES.double()
        assert relative_difference(fold(compact.eval())(images), mixture(images)) < 1e-12
