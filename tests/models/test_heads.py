"""From a part's representation to raw outputs, and from these to scores."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from posefabric.models.heads import PartHead, VolumeHead, build_head, score_maps
from posefabric.space.architecture import Head

X = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))


def convolved(head: PartHead, x: torch.Tensor) -> torch.Tensor:
    weight, bias = (
        head.state_dict()["final_layer.1.weight"],
        head.state_dict()["final_layer.1.bias"],
    )
    return functional.conv2d(x.clamp(min=0), weight, bias)


def test_heatmap_head() -> None:
    head = PartHead(6, 3, Head())
    assert torch.allclose(head(X), convolved(head, X)) and head(X).shape == (2, 3, 5, 4)


@pytest.mark.parametrize("scores", ["softmax", "identity"])
def test_vector_head(scores: str) -> None:
    """Channel k d + i is value i of keypoint k; squashed under mean squared error only."""
    head = PartHead(6, 3, Head(kind="vector", dim=4, scores=scores))  # type: ignore[arg-type]
    maps = convolved(head, X)
    length = torch.stack([(maps[:, 4 * k : 4 * k + 4] ** 2).sum(1) for k in range(3)], 1)
    expected = length if scores == "softmax" else length / (1 + length)
    torch.testing.assert_close(head(X), expected)
    if scores == "identity":
        assert head(X).min() >= 0 and head(100 * X).max() < 1
    channels_last = X.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(head(channels_last), expected)


@pytest.mark.parametrize("scores", ["softmax", "identity"])
def test_a_volume_of_vectors_is_a_3d_convolution(scores: str) -> None:
    torch.manual_seed(2)
    head = build_head(6, 3, Head(kind="vector3d", dim=4, scores=scores))  # type: ignore[arg-type]
    assert isinstance(head, VolumeHead)
    torch.nn.init.normal_(head.final_layer_3d.bias)  # type: ignore[arg-type]
    conv3d = torch.nn.Conv3d(6, 3, 1)
    with torch.no_grad():
        conv3d.weight.copy_(head.final_layer_3d.weight[:, :, None])
        conv3d.bias.copy_(head.final_layer_3d.bias)  # type: ignore[union-attr,arg-type]
        volume = head.final_layer(X).view(X.shape[0], 6, 4, *X.shape[2:])
        expected = conv3d(volume).square().sum(2)
        expected = expected if scores == "softmax" else expected / (1 + expected)
        torch.testing.assert_close(head(X), expected)
        lasting = head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(lasting(X), expected)


def test_outputs_leave_half_precision() -> None:
    for kind in ("heatmap", "vector", "vector3d"):
        head = build_head(6, 2, Head(kind=kind))  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            assert head(X).dtype == torch.float32
        assert head.double()(X.double()).dtype == torch.float64


@pytest.mark.parametrize("dim", [1, 8])
def test_vectors_start_where_their_square_has_a_gradient(dim: int) -> None:
    torch.manual_seed(0)
    start = PartHead(64, 8, Head(kind="vector", dim=dim)).final_layer[1].weight
    assert 0.03 < start.std() < 0.07  # type: ignore[operator]
    assert PartHead(64, 8, Head()).final_layer[1].weight.std() < 0.002  # type: ignore[operator]


def test_scores_of_logits_are_probabilities_over_the_targets_peak() -> None:
    outputs = 3 * X
    scores = score_maps(outputs, Head(scores="softmax", peak=0.25))
    for b in range(2):
        for k in range(6):
            exponentials = outputs[b, k].double().exp()
            expected = exponentials / exponentials.sum() / 0.25
            torch.testing.assert_close(scores[b, k].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(score_maps(outputs, Head(scores="identity")), outputs)


def test_scores_of_a_perfect_fit_peak_at_one() -> None:
    target = torch.exp(-((torch.arange(9.0) - 4) ** 2) / 2)
    target = (target[:, None] * target)[None, None]
    peak = float(target.max() / target.sum())
    scores = score_maps(target.log(), Head(scores="softmax", peak=peak))
    torch.testing.assert_close(scores, target)


@pytest.mark.parametrize("kind", ["vector", "vector3d"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_do_not_overflow_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Vectors of 300 and more, whose squares float16 does not have, and maps near its end."""
    torch.manual_seed(1)
    head = build_head(6, 3, Head(kind=kind, dim=8, scores="identity"))  # type: ignore[arg-type]
    for scale in (1e-3, 1.0, 5e3, 6e4):
        x = (X.sign() * scale).to(dtype).requires_grad_()
        exact = x.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = head(x)
        expected = head(exact)
        assert found.dtype == torch.float32 and found.isfinite().all() and found.max() <= 1
        found.sum().backward()
        expected.sum().backward()
        assert x.grad is not None and exact.grad is not None and x.grad.isfinite().all()
        if kind == "vector":
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)
            torch.testing.assert_close(x.grad.float(), exact.grad, rtol=0.02, atol=1e-6)
