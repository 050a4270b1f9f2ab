"""One cell against a straightforward computation with torch's functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from posefabric.space.architecture import Cell as CellGraph
from posefabric.space.architecture import Choice, Edge, Source
from posefabric.space.cell import Cell, FromCoarser, FromFiner, add, build_source, is_zero

OPERATIONS = ("zero", "skip", "conv_3x3")


def make_graph(*, nodes: int = 1, edges: bool = True) -> CellGraph:
    choices = tuple(Choice(operation=name, weight=1 / 3) for name in OPERATIONS)
    pairs = [(i, j) for j in range(1, nodes + 1) for i in range(j)] if edges else []
    return CellGraph(
        layer=3,
        scale=1,
        width=4,
        sources=(
            Source(kind="same", scale=1, weight=0.2, slot=0),
            Source(kind="finer", scale=0, weight=0.3, slot=1),
            Source(kind="coarser", scale=2, weight=0.5, slot=2),
        ),
        edges=tuple(Edge(start=i, end=j, choices=choices) for i, j in pairs),
    )


def make_cell(graph: CellGraph, *, faithful: bool = False) -> Cell:
    torch.manual_seed(0)
    cell = Cell(graph, widths=(2, 4, 8, 16), faithful=faithful)
    for name, tensor in cell.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape)
            tensor.copy_(1 + noise.tanh() / 2 if "running_var" in name else noise)
    return cell.double().eval()


def make_inputs() -> dict[int, Tensor]:
    torch.manual_seed(1)
    sizes = {0: (2, 16), 1: (4, 8), 2: (8, 4)}
    return {s: torch.randn(3, c, side, side).double() for s, (c, side) in sizes.items()}


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    n = dict(norm.named_buffers()) | dict(norm.named_parameters())
    shape = (1, -1, 1, 1)
    x = (x - n["running_mean"].view(shape)) / (n["running_var"].view(shape) + 1e-5).sqrt()
    return x * n["weight"].view(shape) + n["bias"].view(shape)


def expected_input(cell: Cell, inputs: dict[int, Tensor], weights: list[float]) -> Tensor:
    w = cell.state_dict()
    finer = functional.conv2d(
        inputs[0], w["sources.1.conv.weight"], w["sources.1.conv.bias"], stride=2, padding=1
    )
    finer = normed(finer, cell.sources["1"].get_submodule("norm"))
    coarser = functional.conv2d(inputs[2], w["sources.2.conv.weight"], w["sources.2.conv.bias"])
    coarser = upsampled(normed(coarser, cell.sources["2"].get_submodule("norm")))
    total = weights[0] * inputs[1] + weights[1] * finer + weights[2] * coarser
    return total.clamp(min=0)


def upsampled(x: Tensor) -> Tensor:
    """Bilinear x2 with corners aligned, by a matrix: output i lies at i (n - 1) / (2 n - 1)."""
    size = x.shape[-1]
    matrix = torch.zeros(2 * size, size, dtype=x.dtype)
    for i in range(2 * size):
        at = i * (size - 1) / (2 * size - 1)
        low = min(int(at), size - 2)
        matrix[i, low], matrix[i, low + 1] = 1 - (at - low), at - low
    return matrix @ x @ matrix.T


@pytest.mark.parametrize("faithful", [False, True])
def test_a_cell_of_two_nodes(faithful: bool) -> None:
    cell = make_cell(make_graph(nodes=2), faithful=faithful)
    inputs, sources = make_inputs(), [0.7, 1.1, 0.4]
    rows = [[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]]
    out = cell(inputs, sources, rows, finest=inputs[0])
    h0 = expected_input(cell, inputs, sources)

    def mixed(name: str, x: Tensor, row: list[float]) -> Tensor:
        w = cell.state_dict()
        conv = functional.conv2d(
            x, w[f"edges.{name}.conv_3x3.weight"], w[f"edges.{name}.conv_3x3.bias"], padding=1
        )
        return row[1] * x + row[2] * conv

    h1 = mixed("0-1", h0, rows[0])
    h2 = mixed("0-2", h0, rows[1]) + mixed("1-2", h1, rows[2])
    expected = functional.conv2d(
        torch.cat([h1, h2], 1), cell.state_dict()["keep.weight"], cell.state_dict()["keep.bias"]
    )
    if not faithful:
        expected = normed(expected, cell.norm)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert out.shape == (3, 4, 8, 8)


def test_weights_may_be_tensors_and_receive_gradients() -> None:
    cell, inputs = make_cell(make_graph()), make_inputs()
    numbers = [0.7, 1.1, 0.4], [0.5, 0.2, 0.3]
    plain = cell(inputs, numbers[0], [numbers[1]], finest=inputs[0])
    sources, row = (torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in numbers)
    out = cell(inputs, list(sources), [list(row)], finest=inputs[0])
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
    out.square().sum().backward()
    assert sources.grad is not None and (sources.grad != 0).all()
    assert row.grad is not None and row.grad[0] == 0 and (row.grad[1:] != 0).all()


def test_what_weighs_nothing_is_not_computed() -> None:
    """Neither the value nor batch statistics depend on it, so that it can be pruned."""
    cell, inputs = make_cell(make_graph()).train(), make_inputs()
    before = {k: v.clone() for k, v in cell.state_dict().items()}
    inputs[2] = torch.full_like(inputs[2], torch.nan)
    out = cell(inputs, [1.0, 0.5, 0.0], [[0.5, 0.5, 0.0]], finest=inputs[0])
    assert torch.isfinite(out).all()
    after = cell.state_dict()
    changed = {k for k in before if "running" in k and not torch.equal(before[k], after[k])}
    assert changed == {
        f"{place}.running_{kind}"
        for place in ("norm", "sources.1.norm")
        for kind in ("mean", "var")
    }


def test_a_cell_whose_operations_all_weigh_nothing_is_its_bias() -> None:
    cell, inputs = make_cell(make_graph(nodes=2), faithful=True), make_inputs()
    out = cell(inputs, [1.0, 0.0, 0.0], [[1.0, 0.0, 0.0]] * 3, finest=inputs[0])
    bias = cell.state_dict()["keep.bias"].view(1, -1, 1, 1)
    assert torch.equal(out, bias.expand(3, 4, 8, 8))


def test_a_node_that_nothing_reaches_still_feeds_operations_their_zero() -> None:
    """Node 1 is dead, yet the convolution from it to node 2 adds its bias."""
    cell, inputs = make_cell(make_graph(nodes=2), faithful=True), make_inputs()
    rows = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
    out = cell(inputs, [1.0, 0.0, 0.0], rows, finest=inputs[0])
    w = cell.state_dict()
    node2 = 2 * w["edges.1-2.conv_3x3.bias"]
    expected = w["keep.weight"][:, 4:, 0, 0] @ node2 + w["keep.bias"]
    torch.testing.assert_close(
        out, expected.view(1, 4, 1, 1).expand(3, 4, 8, 8), rtol=0, atol=1e-12
    )


def test_a_cell_without_edges_is_a_constant_map_of_its_scale() -> None:
    cell = make_cell(make_graph(edges=False))
    assert list(cell.state_dict()) == ["constant"]
    out = cell({}, [], [], finest=torch.zeros(3, 9, 16, 24, dtype=torch.float64))
    assert out.shape == (3, 4, 8, 12)
    assert torch.equal(out, cell.constant.expand(3, 4, 8, 12))


def test_sources_change_scale_and_width() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert build_source("same", 4, 4)(x) is x
    finer, coarser = build_source("finer", 4, 8), build_source("coarser", 4, 2)
    assert isinstance(finer, FromFiner) and finer(x).shape == (2, 8, 4, 4)
    assert isinstance(coarser, FromCoarser) and coarser(x).shape == (2, 2, 16, 16)


def test_zero_and_add() -> None:
    assert is_zero(0.0) and not is_zero(torch.tensor(0.0)) and not is_zero(1.0)
    x, y = torch.tensor([1.0]), torch.tensor([3.0])
    assert add(None, x, 1.0) is x
    assert add(None, x, 2.0).item() == 2.0
    assert add(y, x, 0.5).item() == 3.5
