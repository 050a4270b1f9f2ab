"""That a network's training step takes the kernels: results are the same without them."""

from __future__ import annotations

import collections
import contextlib
import copy
from typing import Any

import pytest
import torch
from networks import pose_batches
from torch.utils._python_dispatch import TorchDispatchMode

from posefabric.config import load_config
from posefabric.models.build import build_supernet
from posefabric.models.grouped import fast_path, plain_path
from posefabric.models.kernels import has_tiles, load_kernels
from posefabric.train.gradients import add_gradients

pytestmark = pytest.mark.skipif(
    load_kernels().library is None, reason=f"no kernels: {load_kernels().reason}"
)


class Operations(TorchDispatchMode):
    """Counts torch's own operations that compute a map (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, list | tuple) and result else result
        if isinstance(first, torch.Tensor) and first.ndim == 4 and not func.is_view:
            self.found[func.overloadpacket.__name__] += 1
        return result


def a_network(backbone: str, *, frozen: bool = True) -> Any:
    """A mixture of three parts, its stem up to stride 4 frozen or not."""
    options = [
        f"model.frozen_stem={frozen}",
        "data.input_wh=[64,64]",
        f"model.backbone={backbone}",
        "model.weights=none",
        "model.parts=3",
        "model.channel_factor=4",
    ]
    network = build_supernet(load_config("lspet_first_look", options)).train()
    return fast_path(network.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def operations(network: Any, dtype: torch.dtype = torch.float32) -> collections.Counter[str]:
    (batch,) = pose_batches(network, 1, persons=2, dtype=torch.float32)

    def autocast() -> contextlib.AbstractContextManager[Any]:
        low = dtype == torch.bfloat16
        return torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext()

    with Operations() as seen:
        add_gradients(
            network, batch, loss="cross_entropy", autocast=autocast, scale=lambda own: own
        )
    return seen.found


# All that norms, activations and products of a mixture would be, but for the heads' ReLU.
OF_NORMS_AND_SUMS = (
    "native_batch_norm",
    "native_batch_norm_backward",
    "relu_",
    "hardtanh_",
    "clamp_",
    "hardtanh_backward",
    "mul",
)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen stem", "all learns"])
@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "posenfs_resnet50"])
def test_norms_activations_and_sums_are_the_kernels(backbone: str, frozen: bool) -> None:
    network = a_network(backbone, frozen=frozen)
    found = operations(network)
    assert not {name: found[name] for name in OF_NORMS_AND_SUMS if found[name]}
    assert found["relu"] == found["threshold_backward"] == len(network.parts)
    plain = operations(plain_path(network))
    assert plain["native_batch_norm"] > 50 and plain["mul"] > 50 and plain["relu_"] > 10


@pytest.mark.skipif(not has_tiles(), reason="no AMX tiles for bfloat16 on this processor")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen stem", "all learns"])
@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "posenfs_resnet50"])
def test_on_tiles_torch_has_only_the_convolutions_with_a_window(
    backbone: str, frozen: bool
) -> None:
    network = a_network(backbone, frozen=frozen)
    convs = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    left = [m for m in convs if m.groups == 1 and (m.kernel_size, m.stride) != ((1, 1), (1, 1))]
    found = operations(network, torch.bfloat16)
    assert found["convolution"] == len(left) < len(convs) / 2


@pytest.mark.skipif(not has_tiles(), reason="no AMX tiles for bfloat16 on this processor")
@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "posenfs_resnet50"])
def test_gradients_that_meet_are_added_by_the_kernels(backbone: str) -> None:
    """Of shortcuts, candidates and levels; torch adds those of a cell's readers, two a cell."""
    network = a_network(backbone)
    found = operations(network, torch.bfloat16)
    cells = sum(len(part.cells) for part in network.graph.parts)
    assert found["add"] + found["add_"] <= 2 * cells
    plain = operations(plain_path(network), torch.bfloat16)
    assert plain["add"] + plain["add_"] > 4 * cells


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "posenfs_resnet50"])
def test_a_frozen_stem_on_the_kernels_is_the_plain_one(backbone: str) -> None:
    """Outputs, gradients and statistics in float64; the stem's statistics are not moved."""
    network = a_network(backbone).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, buffer in network.backbone.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
    plain = plain_path(copy.deepcopy(network))
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    before = [b.clone() for m in network.backbone._frozen for b in m.buffers(recurse=False)]
    found = []
    for each in (network, plain):
        levels = each.backbone(images)
        sum((level**2).mean() for level in levels).backward()
        gradients = {n: p.grad for n, p in each.backbone.named_parameters() if p.grad is not None}
        found.append([*levels, *gradients.values(), *each.backbone.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    after = [b for m in network.backbone._frozen for b in m.buffers(recurse=False)]
    assert before and all(map(torch.equal, before, after))
