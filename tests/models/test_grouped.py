"""The fast path equals the plain one: outputs, gradients, statistics, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import EVERY, PLAIN, make_supernet
from torch import Tensor, nn

from posefabric.models.fused import Window, depthwise
from posefabric.models.grouped import Fast, fast_path, plain_path
from posefabric.models.native import load_kernels

pytestmark = pytest.mark.skipif(
    load_kernels().library is None, reason=f"no kernels: {load_kernels().reason}"
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def trained(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output, every gradient and every buffer after one training step's passes."""
    network.train()
    images = images.clone().requires_grad_()
    out = network(images)
    out.backward(noise(*out.shape, seed=1))
    assert images.grad is not None
    found = {"output": out.detach(), "images": images.grad}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found | dict(network.named_buffers())


def assert_equal(network: nn.Module, images: Tensor) -> None:
    network = network.double()
    fast = fast_path(copy.deepcopy(network).to(memory_format=torch.channels_last))
    expected = trained(network, images)
    found = trained(fast, images.contiguous(memory_format=torch.channels_last))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-8 * max(1.0, float(value.abs().max()))
        assert float((found[name] - value).abs().max()) <= bound, name


@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_mixture_equals_the_plain_one(data: st.DataObject) -> None:
    draw = data.draw
    operations = draw(st.lists(st.sampled_from(EVERY[1:]), min_size=1, max_size=4, unique=True))
    network = make_supernet(
        seed=draw(st.integers(0, 99)),
        operations=("zero", *operations) if draw(st.booleans()) else tuple(operations),
        hidden_nodes=draw(st.integers(1, 3)),
        faithful=draw(st.booleans()),
        relaxation=draw(st.sampled_from(["softmax", "sparsemax"])),
        head=draw(st.sampled_from(["heatmap", "vector", "vector3d"])),
        shared_alpha=draw(st.booleans()),
        channel_factor=draw(st.integers(1, 3)),
        first_layer=draw(st.sampled_from([3, 4, 5])),
        parts=draw(st.sampled_from([None, {"all": (0, 1, 2, 3)}])),
    )
    assert_equal(network, noise(2, 3, 64, 64))
