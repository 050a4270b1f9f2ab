"""The kernels' convolutions in a compiled graph: known to torch.compile, and taken."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import noise
from torch import nn

from posefabric.models import traced_convolutions
from posefabric.models.grouped import fast_path
from posefabric.models.kernels import has_tiles, load_kernels
from posefabric.models.timm_import import import_timm
from posefabric.models.traced_convolutions import trace_convolutions

pytestmark = pytest.mark.skipif(
    load_kernels().library is None, reason=f"no kernels: {load_kernels().reason}"
)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def convolutions() -> dict[str, nn.Conv2d]:
    return {
        "pointwise": nn.Conv2d(6, 5, 1),
        "without bias": nn.Conv2d(6, 5, 1, bias=False),
        "depthwise": nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False),
    }


@pytest.mark.parametrize("kind", list(convolutions()))
def test_torch_can_trace_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch itself asks of an operation: its fake maps, its gradients, its layouts."""
    monkeypatch.setattr(traced_convolutions, "has_tiles", lambda: True)
    conv: Any = convolutions()[kind].double()
    trace_convolutions(conv)
    operations, x = conv.operations, noise(2, 6, 5, 4).requires_grad_()
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    if kind == "depthwise":
        torch.library.opcheck(operations.depthwise, (x, conv.weight, conv.numbers))
    else:
        torch.library.opcheck(operations.pointwise, (x, conv.weight, conv.bias))


@pytest.mark.skipif(not has_tiles(), reason="no AMX tiles for bfloat16 on this processor")
@pytest.mark.parametrize("kind", list(convolutions()))
def test_they_are_the_kernels_to_the_last_bit(kind: str) -> None:
    conv = convolutions()[kind].train()
    traced, fast = copy.deepcopy(conv), fast_path(copy.deepcopy(conv))
    trace_convolutions(traced)
    compiled: Any = torch.compile(traced, backend="aot_eager", fullgraph=True)
    found = []
    for network in (compiled, fast):
        x = noise(3, 6, 7, 5).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = network(x)
        towards = noise(*out.shape, seed=1).bfloat16().to(memory_format=torch.channels_last)
        gradients = torch.autograd.grad(out, (x, *network.parameters()), towards)
        found.append([out, *gradients])
    assert all(map(torch.equal, *found))


def test_padding_that_follows_the_map_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_convolutions, "has_tiles", lambda: True)
    import_timm()
    from timm.layers.conv2d_same import Conv2dSame

    conv = Conv2dSame(6, 6, 3, stride=2, groups=6, bias=False)
    trace_convolutions(conv)
    assert type(conv) is Conv2dSame


@pytest.mark.skipif(not has_tiles(), reason="no AMX tiles for bfloat16 on this processor")
def test_outside_of_bfloat16_they_are_torchs() -> None:
    conv: Any = nn.Conv2d(6, 5, 1).double()
    x = noise(2, 6, 3, 3)
    expected = conv(x)
    trace_convolutions(conv)
    assert torch.equal(conv(x), expected)
