"""A network as an ONNX graph in memory: uint8 crops in, score maps and keypoints out."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posefabric import __version__
from posefabric.config import Config
from posefabric.data.batch import Normalisation
from posefabric.data.codec import Codec
from posefabric.data.pipeline import make_codec
from posefabric.deploy.exported import EXPORT_VERSION, SIZE_STEP
from posefabric.derive.fold import deployable
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.compact import build_compact
from posefabric.models.supernet import Supernet
from posefabric.skeletons import Skeleton
from posefabric.structures import PosefabricError

_CROP_RULE = (
    "Widen the person's box (x, y, width, height) about its centre to the aspect ratio of "
    "input_wh, multiply both sides by box_padding, and warp that region to input_wh by linear "
    "interpolation on a black ground. warp in conventions says how: biased, the region spans "
    "W x H pixels about (W / 2, H / 2); unbiased, W - 1 x H - 1 about ((W - 1) / 2, "
    "(H - 1) / 2). Keypoints go back by "
    "the inverse of that warp."
)


class ExportedNetwork(nn.Module):
    """uint8 crops (B, H, W, 3) to score maps (B, K, h, w) and, decoded, keypoints and scores."""

    def __init__(
        self, network: nn.Module, *, normalisation: Normalisation, codec: Codec, decode: bool
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.normalisation = normalisation
        self.codec = codec
        self.decode = decode

    @property
    def outputs(self) -> list[str]:
        """The names of what :meth:`forward` gives."""
        return ["heatmaps", "keypoints", "scores"] if self.decode else ["heatmaps"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        inputs = self.normalisation.apply(images.permute(0, 3, 1, 2).float())
        maps = self.network.score_maps(self.network(inputs))
        if not self.decode:
            return (maps,)
        keypoints, scores = self.codec.decode(maps)
        return maps, keypoints, scores.clamp(0, 1)


def exported_network(network: nn.Module, config: Config, *, decode: bool) -> ExportedNetwork:
    """The network with what goes into the graph around it, in evaluation mode."""
    normalisation: Normalisation = getattr(network, "normalisation", Normalisation())
    return ExportedNetwork(
        network, normalisation=normalisation, codec=make_codec(config.data), decode=decode
    ).eval()


def deployable_network(network: nn.Module) -> nn.Module:
    """The plain, folded network that computes the same; a mixture is pruned without loss."""
    if isinstance(network, Supernet):
        # The relaxation of alpha and beta is data to the exporter; as constants it is gone.
        compact = build_compact(prune(network.architecture()))
        transfer_weights(network, compact)
        network = compact.eval()
    return deployable(network)


def make_onnx(
    module: ExportedNetwork,
    crops: np.ndarray,
    *,
    config: Config,
    skeleton: Skeleton,
    digest: str | None,
    opset: int,
    dynamic_size: bool,
) -> Any:
    """The ONNX model of a network, with the metadata that tells how to use it.

    Args:
        crops: (N, H, W, 3) uint8, two of them or more, to trace with.
        digest: of the architecture, where there is one.
        dynamic_size: height and width are free, in steps of 32 pixels from 64; the module must not
            decode.

    Raises PosefabricError when the exporter fails, or the graph is not valid.
    """
    import onnx
    import onnx.checker

    axes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        for axis, name in ((1, "rows"), (2, "columns")):
            # From 2, since a side of 1 at the deepest level would be traced as fixed.
            axes[axis] = SIZE_STEP * torch.export.Dim(name, min=2, max=64)
    model = _trace(module, crops[:2], module.outputs, opset, axes)
    metadata = _metadata(config, module.codec, module.normalisation, skeleton, module.outputs)
    metadata["architecture_digest"] = digest
    metadata["dynamic_size"] = dynamic_size
    model.producer_name, model.producer_version = "posefabric", __version__
    model.doc_string = f"Pose estimation, {skeleton.name}. {_CROP_RULE}"
    set_metadata(model, metadata)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise PosefabricError(f"the exported graph is not valid ONNX: {error}") from error
    return model


def set_metadata(model: Any, metadata: dict[str, Any]) -> None:
    """Put the metadata into an ONNX model, as JSON strings, in place of what it had."""
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))


def get_metadata(model: Any) -> dict[str, Any]:
    """What :func:`set_metadata` put there."""
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def _trace(
    module: nn.Module, crops: np.ndarray, outputs: list[str], opset: int, axes: dict[int, Any]
) -> Any:
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (torch.from_numpy(crops),),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["images"],
                output_names=outputs,
                dynamic_shapes={"images": axes},
            )
        assert program is not None
        model = program.model_proto
    except Exception as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        free = " of any size (leave out --dynamic-size)" if len(axes) > 1 else ""
        raise PosefabricError(
            f"torch {torch.__version__} could not export this network{free} with opset {opset} "
            f"({type(error).__name__}: {first})"
        ) from error
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise PosefabricError(
            f"opset={opset}: torch {torch.__version__} could only write opset {written}; use that"
        )
    # The exporter notes source lines and local paths at every node.
    for entry in (model.graph, *model.graph.node, *model.graph.value_info):
        del entry.metadata_props[:]
    return model


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter's progress, hints and warnings are not for the user."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    sink = io.StringIO()
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(sink):
                yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def _metadata(
    config: Config,
    codec: Codec,
    normalisation: Normalisation,
    skeleton: Skeleton,
    outputs: list[str],
) -> dict[str, Any]:
    return {
        "posefabric": __version__,
        "export_version": EXPORT_VERSION,
        "name": config.name,
        "precision": "fp32",
        "skeleton": {
            "name": skeleton.name,
            "keypoints": skeleton.keypoints,
            "limbs": skeleton.limbs,
            "flip_pairs": skeleton.flip_pairs,
            "sigmas": skeleton.sigmas.tolist(),
            "sigmas_source": skeleton.sigmas_source,
        },
        "input": "images: (batch, height, width, 3) uint8 RGB crops, not normalised",
        "outputs": outputs,
        "input_wh": codec.input_wh,
        "preset": codec.preset,
        "heatmap": {"wh": codec.heatmap_wh, "stride": codec.stride, "sigma": codec.sigma},
        "normalisation": {
            "in_graph": True,
            "mean": normalisation.mean,
            "std": normalisation.std,
            "channel_order": normalisation.channel_order,
        },
        "box_padding": codec.rules.box_padding,
        "box_to_crop": _CROP_RULE,
        "flip_shift": int(codec.rules.flip_shift),
        "conventions": asdict(codec.rules),
    }
