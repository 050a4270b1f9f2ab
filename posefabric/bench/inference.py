"""The arms that predict: eager forward passes, the ONNX runtimes, evaluation of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posefabric.bench.fresh import Gate, answer_turns
from posefabric.bench.released import ReleasedForEvaluation, released_network
from posefabric.bench.timing import Arm, Rounds, interleaved, stopwatch
from posefabric.config import Config
from posefabric.data.pipeline import make_codec, make_geometry, open_dataset
from posefabric.deploy.openvino_predictor import openvino_core
from posefabric.evaluate.runner import predict_dataset
from posefabric.models.build import build_baseline, build_supernet
from posefabric.models.network import PoseNetwork
from posefabric.train.precision import resolve_precision

RUNTIMES = ("onnxruntime", "openvino")


def own_network(config: Config, device: torch.device) -> PoseNetwork:
    """A mixture or a baseline by the package's default options, laid out as a training does."""
    network = build_supernet(config) if config.model.network == "fabric" else build_baseline(config)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()


def images_of(config: Config, batch: int, device: torch.device) -> Tensor:
    """Seeded noise (B, 3, H, W); what a convolution takes does not depend on what it sees."""
    width, height = config.data.input_wh
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height, width, generator=generator).to(device)


def forward_arm(
    network: nn.Module, images: Tensor, *, precision: str = "fp32", channels_last: bool = True
) -> Arm:
    """Seconds of one forward pass without gradients."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    device = images.device

    def work() -> None:
        low = precision == "bf16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
            network(images)

    wait = None if device.type == "cpu" else lambda: torch.cuda.synchronize(device)
    return stopwatch(work, wait=wait)


def forward_rounds(
    gate: Gate, *, configs: Mapping[str, Config], batch: int, device: str, plan: Rounds
) -> None:
    """At a turn: seconds of a forward pass by arm and round, all in this process.

    The arm ``theirs`` is the yardstick of its configuration, every other one the package's own
    network. The answer has "took" and "precision".
    """
    place = torch.device(device)
    arms: dict[str, Arm] = {}
    precision = "fp32"
    for name, config in configs.items():
        images = images_of(config, batch, place)
        if name == "theirs":
            yardstick = released_network(config).to(place).eval()
            arms[name] = forward_arm(yardstick, images, channels_last=False)
            continue
        precision = resolve_precision(config.search.precision, place)
        arms[name] = forward_arm(own_network(config, place), images, precision=precision)
    answer_turns(gate, lambda: {"took": interleaved(arms, plan), "precision": precision})


def evaluation_rounds(
    gate: Gate, *, config: Config, persons: int, batch: int, plan: Rounds
) -> None:
    """At a turn: seconds to predict the data set of a configuration, by arm and round.

    Pictures are read, cropped, run with the flip test and decoded; ours as `posefabric eval` does.
    """
    device = torch.device("cpu")
    dataset = open_dataset(config.data, "train", evaluating=True)
    dataset = dataclasses.replace(dataset, persons=dataset.persons[:persons])
    own = own_network(config, device)
    networks: dict[str, nn.Module] = {
        "ours": own,
        "theirs": ReleasedForEvaluation(released_network(config)).eval(),
    }

    def arm(network: nn.Module) -> Arm:
        return stopwatch(
            lambda: predict_dataset(
                network,
                dataset,
                geometry=make_geometry(config.data),
                codec=make_codec(config.data),
                normalisation=own.normalisation,
                flip=True,
                batch_size=batch,
                device=device,
            )
        )

    arms = {name: arm(network) for name, network in networks.items()}
    answer_turns(gate, lambda: {"took": interleaved(arms, plan), "persons": len(dataset)})


def runtime_arm(name: str, path: Path, crops: np.ndarray, *, threads: int) -> Arm:
    """Seconds of one run of an exported network on uint8 crops (B, H, W, 3)."""
    run = RUNNERS[name](path, threads)
    return stopwatch(lambda: run(crops))


def _onnxruntime(path: Path, threads: int) -> Callable[[np.ndarray], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda crops: session.run(["heatmaps"], {"images": crops})


def _openvino(path: Path, threads: int) -> Callable[[np.ndarray], Any]:
    settings = {
        # Left alone it takes bf16 wherever the CPU has it; the others compute in fp32.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino_core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda crops: request.infer({"images": crops})


RUNNERS: dict[str, Callable[[Path, int], Callable[[np.ndarray], Any]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
