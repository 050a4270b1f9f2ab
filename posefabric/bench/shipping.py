"""What is shipped, and its peers: exported to ONNX, then run beside the mixture it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from posefabric.bench.fresh import Gate
from posefabric.bench.inference import (
    forward_arm,
    images_of,
    own_network,
    runtime_arm,
)
from posefabric.bench.timing import Arm, Rounds, interleaved
from posefabric.config import Config
from posefabric.deploy.export import export_onnx
from posefabric.derive.draw import draw, kept
from posefabric.derive.fold import fold
from posefabric.derive.transfer import transfer_weights
from posefabric.models.build import build_baseline, build_supernet
from posefabric.models.compact import CompactNetwork, build_compact
from posefabric.models.network import PoseNetwork
from posefabric.skeletons import load_skeleton


def random_compact(config: Config) -> CompactNetwork:
    """A compact network by the ``derive`` options from a mixture with random alpha and beta."""
    mixture = build_supernet(config).eval()
    draw(mixture, torch.Generator().manual_seed(config.seed))
    graph = kept(mixture.architecture(), config.derive)
    compact = build_compact(graph)
    transfer_weights(mixture, compact)
    return compact.eval()


def exported(gate: Gate, *, config: Config, path: Path) -> None:
    """Write a fabric's random compact network, or a baseline, as ONNX; then answer its facts.

    The work is done before the first turn, so that several can be made side by side.
    """
    network: PoseNetwork
    if config.model.network == "fabric":
        network = random_compact(config)
    else:
        network = build_baseline(config).eval()
    skeleton = load_skeleton(config.data.skeleton)
    facts = export_onnx(network, path, config=config, skeleton=skeleton, decode=False)
    if gate.turn():
        gate.answer(facts)


def shipped_rounds(
    gate: Gate,
    *,
    config: Config,
    files: dict[str, Path],
    runtimes: tuple[str, ...],
    batches: tuple[int, ...],
    plan: Rounds,
) -> None:
    """At each turn the next batch size: seconds by arm and round, in one process.

    Arms are ``mixture`` and ``compact`` in eager, and (file's name, runtime) as NAME@RUNTIME for
    every file and runtime. ONNX files take uint8 crops and put out score maps; the eager arms
    are spared both and take normalised images.
    """
    threads = torch.get_num_threads()
    device = torch.device("cpu")
    mixture, compact = own_network(config, device), fold(random_compact(config))
    compact.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    width, height = config.data.input_wh
    for batch in batches:
        if not gate.turn():
            return
        noise = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3))
        crops = noise.astype(np.uint8)
        images = images_of(config, batch, device)
        arms: dict[str, Arm] = {
            "mixture": forward_arm(mixture, images),
            "compact": forward_arm(compact, images),
        }
        for runtime in runtimes:
            for name, path in files.items():
                arms[f"{name}@{runtime}"] = runtime_arm(runtime, path, crops, threads=threads)
        gate.answer(interleaved(arms, plan))
    gate.turn()
