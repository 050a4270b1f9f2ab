"""The fast path equals the plain one: outputs, gradients, statistics, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import EVERY, PLAIN, make_supernet, noise
from torch import Tensor, nn

from posefabric.models import fast_convolutions, grouped
from posefabric.models.backbones import make_backbone
from posefabric.models.fast_convolutions import Fast
from posefabric.models.grouped import fast_path, plain_path
from posefabric.models.kernels import Kernels, load_kernels
from posefabric.models.network import first_non_finite
from posefabric.models.posenfs_backbones import Bottleneck, InvertedResidual
from posefabric.search.bilevel import unrolled_gradients
from posefabric.space.operations import build_operation
from posefabric.structures import PoseBatch
from posefabric.train.loss import LOSSES
from posefabric.train.probe import Probe
from posefabric.train.strategy import Evidence

pytestmark = pytest.mark.skipif(
    load_kernels().library is None, reason=f"no kernels: {load_kernels().reason}"
)


BEFORE_A_NORM = (".keep.bias", ".conv.bias", ".0.bias")


def trained(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output, every gradient and every buffer after one training step's passes."""
    network.train()
    images = images.clone().requires_grad_()
    out = network(images)
    out.backward(noise(*out.shape, seed=1))
    # Where sparsemax leaves nothing, the images have no influence.
    found = {"output": out.detach()} | ({} if images.grad is None else {"images": images.grad})
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found | dict(network.named_buffers())


def assert_equal(network: nn.Module, images: Tensor) -> None:
    assert_equal_path(network, images, fast_path)


def assert_equal_path(
    network: nn.Module, images: Tensor, path: Callable[[nn.Module], nn.Module]
) -> None:
    network = network.double()
    fast = path(copy.deepcopy(network).to(memory_format=torch.channels_last))
    expected = trained(network, images)
    found = trained(fast, images.contiguous(memory_format=torch.channels_last))
    assert found.keys() == expected.keys()
    gradients = [expected[n] for n, _ in network.named_parameters() if n in expected]
    largest = max(float(value.abs().max()) for value in gradients)
    for name, value in expected.items():
        # A bias before a norm has no influence: on both paths its gradient is what rounding leaves
        # of terms that are as large as the network's gradients are.
        size = largest if name.endswith(BEFORE_A_NORM) else float(value.double().abs().max())
        bound = 1e-8 * max(1.0, size)
        assert float((found[name].double() - value.double()).abs().max()) <= bound, name


PHASES = (Phase.explicit, Phase.generate)  # without shrinking, which takes minutes here


@given(data=st.data())
@settings(max_examples=3, deadline=None, derandomize=True, phases=PHASES)
def test_any_mixture_equals_the_plain_one(data: st.DataObject) -> None:
    check_a_mixture(data.draw)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True, phases=PHASES)
def test_many_mixtures_equal_the_plain_ones(data: st.DataObject) -> None:
    check_a_mixture(data.draw)


def check_a_mixture(draw: Any) -> None:
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


def blocks() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {
        "bottleneck": nn.Sequential(Bottleneck(6, 4, stride=2), Bottleneck(16, 4)),
        "inverted": InvertedResidual(6, 6, stride=1, expansion=3),
        "chain": nn.Sequential(
            nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7), nn.ReLU6(), nn.Conv2d(7, 2, 1)
        ),
    }


@pytest.mark.parametrize("name", ["bottleneck", "inverted", "chain"])
def test_blocks_of_backbones(name: str) -> None:
    assert_equal(blocks()[name], noise(3, 6, 9, 8))


class Resting(nn.Sequential):
    """Its norms stay as in evaluation."""

    def train(self, mode: bool = True) -> Resting:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def test_bottlenecks_whose_norms_rest() -> None:
    bottlenecks: Any = blocks()["bottleneck"]
    assert_equal(Resting(*bottlenecks), noise(3, 6, 9, 8))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "posenfs_resnet50"])
def test_backbones(name: str) -> None:
    """TensorFlow's padding, depthwise 5x5, ReLU6; bottlenecks and their stem."""
    backbone = make_backbone(name, levels=2)
    assert_equal(FinestAndCoarsest(backbone), noise(2, 3, 32, 32))


def test_a_resnet_keeps_one_map_a_norm_and_one_a_block() -> None:
    """Bytes kept of a picture, of all that is no parameter: what is computed again is not kept."""
    resnet: Any = fast_path(make_backbone("posenfs_resnet50", levels=2).train())
    own, expected = {p.data_ptr() for p in resnet.parameters()}, 0
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if value.data_ptr() not in own and value.ndim == 4:
            kept[value.data_ptr()] = value
        return value

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal expected
        expected += out.numel() * out.element_size()

    for module in resnet.modules():
        if isinstance(module, (nn.Conv2d, Bottleneck)):
            module.register_forward_hook(count)
    images = noise(2, 3, 64, 64).float().to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        resnet(images)
    found = sum(value.numel() * value.element_size() for value in kept.values())
    # Beside them the first block's input and where its maxima lay, in 64-bit numbers.
    pooled = 2 * 64 * 16 * 16 * (4 + 8)
    assert found <= expected + pooled + images.numel() * 4


class FinestAndCoarsest(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        levels = self.backbone(images)
        return torch.cat([levels[0].flatten(1), levels[-1].flatten(1)], 1)[:, :, None, None]


@pytest.mark.parametrize("operation", [o for o in EVERY if o != "zero"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_gradients_of_every_candidate(operation: str, layout: torch.memory_format) -> None:
    """Over the shapes in use, against float64 on the plain path."""
    for channels, side in [(32, 32), (64, 16), (128, 8), (256, 4)]:
        if channels > 64 and operation in ("basic_conv_3x3", "bottle_conv_3x3"):
            continue  # their dense 3x3 convolutions are torch's, and slow
        torch.manual_seed(0)
        plain = build_operation(operation, channels).train()
        fast = fast_path(copy.deepcopy(plain)).to(memory_format=layout)
        x = noise(2, channels, side, side)
        expected = trained(plain.double(), x)
        # Both see rounded inputs and weights; a wrong kernel is orders off.
        found = trained_single(fast, x.float().contiguous(memory_format=layout))
        for key, value in expected.items():
            if value.is_floating_point():
                error = float((found[key] - value).norm() / value.norm().clamp(min=1e-6))
                assert error < 0.02, (key, channels, error)


def trained_single(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.clone().requires_grad_()
    out = network.train()(images)
    out.backward(noise(*out.shape, seed=1).float())
    assert images.grad is not None
    named = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "images": images.grad, **named, **dict(network.named_buffers())}


def test_names_come_and_go_with_nothing_changed() -> None:
    network = make_supernet().train()
    names, kinds = list(network.state_dict()), [type(m) for m in network.modules()]
    assert fast_path(fast_path(network)) is network
    assert any(isinstance(m, Fast) for m in network.modules())
    assert list(network.state_dict()) == names
    assert isinstance(copy.deepcopy(network).parts["upper"].fabric.cells["5_0"], Fast)
    plain_path(network)
    assert [type(m) for m in network.modules()] == kinds


@pytest.mark.parametrize("training", [False, True])
def test_without_gradients_the_plain_forward_runs(training: bool) -> None:
    network = make_supernet(operations=PLAIN).train(training)
    fast = fast_path(copy.deepcopy(network))
    images = noise(2, 3, 64, 64).float()
    with torch.no_grad():
        assert torch.equal(fast(images), network(images))
    if not training:
        assert torch.equal(fast(images), network(images))


def test_the_first_module_that_is_not_finite_has_its_plain_name() -> None:
    network = fast_path(make_supernet().train())
    with torch.no_grad():
        network.get_submodule("parts.upper.fabric.cells.4_0.sources.2.conv").weight.fill_(torch.nan)
    assert first_non_finite(network, noise(2, 3, 64, 64).float()) == (
        "parts.upper.fabric.cells.4_0.sources.2.conv (Conv2d)"
    )


@pytest.mark.parametrize("way", ["first", "second"])
def test_architecture_steps_of_their_own(way: str) -> None:
    """The loss with other weights, and its gradients of alpha and beta, leave the same trace."""
    network = make_supernet(seed=4).double()
    batches = [
        PoseBatch(
            images=noise(2, 3, 64, 64, seed=s),
            heatmaps=noise(2, 4, 16, 16, seed=s).abs(),
            weights=torch.ones(2, 4).double(),
            input_to_image=torch.eye(2, 3).expand(2, 2, 3),
            index=torch.arange(2),
        )
        for s in (1, 2)
    ]
    found = []
    for candidate in (network, fast_path(copy.deepcopy(network))):
        candidate.train()
        weights = {
            n: p for n, p in candidate.named_parameters() if not n.startswith(("alphas", "betas"))
        }
        rates = dict.fromkeys(weights, 1e-3)
        probe = Probe(candidate, loss=LOSSES["cross_entropy"])
        evidence = Evidence(train=batches[0], held_out=batches[1], rates=rates, loss_of=probe)
        kept = {n: b.clone() for n, b in candidate.named_buffers()}
        architecture = list(candidate.arch_parameters().values())
        if way == "second":
            # A narrow difference quotient, in which no ReLU switches, of float64.
            loss, slopes = unrolled_gradients(
                architecture, weights, evidence, rates=rates, perturbation=1e-4
            )
        else:
            loss = evidence.loss_of(evidence.held_out)
            slopes = list(torch.autograd.grad(loss, architecture))
        assert all(torch.equal(b, kept[n]) for n, b in candidate.named_buffers())
        found.append([loss.detach(), *slopes])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            block = fast_path(copy.deepcopy(blocks()["inverted"]).double())
            found.append(trained(block, noise(5, 6, 9, 8)))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-13)


def test_without_a_compiler_the_plain_path_stays_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grouped, "load_kernels", lambda: Kernels(None, "no C++ compiler"))
    network = fast_path(make_supernet())
    assert not any(isinstance(m, Fast) for m in network.modules())
    assert "model.path=fast: no C++ compiler" in caplog.text


@pytest.mark.parametrize(
    ("channels", "side", "product"), [(128, 46, True), (130, 46, False), (130, 8, True)]
)
def test_wide_convolutions_of_large_maps_are_left_to_torch(
    channels: int, side: int, product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []
    pointwise = fast_convolutions.pointwise
    monkeypatch.setattr(
        fast_convolutions, "pointwise", lambda x, *rest: asked.append(x) or pointwise(x, *rest)
    )
    assert_equal(nn.Sequential(nn.Conv2d(channels, 3, 1)), noise(2, channels, side, side))
    assert bool(asked) is product
