"""One phase of a run from its options to trained, evaluated weights on disk."""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch

from posefabric.config import Config, OptimConfig
from posefabric.data.pipeline import (
    TrainingData,
    make_codec,
    make_conventions,
    make_geometry,
    open_dataset,
)
from posefabric.distributed import gather, place
from posefabric.evaluate.kept import save_predictions
from posefabric.evaluate.runner import evaluate_network
from posefabric.models.build import choose_device
from posefabric.models.compiled import compiled_path
from posefabric.models.grouped import fast_path
from posefabric.models.network import PoseNetwork
from posefabric.run import RunFolder
from posefabric.structures import PersonDataset, PosefabricError
from posefabric.train.checkpoint import save_weights
from posefabric.train.loop import Trainer
from posefabric.train.memory import keep_freed_memory
from posefabric.train.strategy import Strategy

_log = logging.getLogger(__name__)


def train_phase(
    network: PoseNetwork,
    *,
    run: RunFolder,
    optim: OptimConfig,
    strategy: Strategy,
    phase: str,
    dataset: PersonDataset | None = None,
    validation: PersonDataset | None = None,
) -> dict[str, Any]:
    """Train, save weights and architecture, evaluate on the validation persons.

    Goes on from the run's newest checkpoint when it has one. Returns the evaluation, which is
    also written to ``evaluation.json``, and what it is of to ``predictions.npz``.
    """
    config = run.config
    _check_loss(network, optim, phase)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    keep_freed_memory(device)
    # What is imported stays; the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    choose_path(network, config, device)
    validation = open_dataset(config.data, "val") if validation is None else validation
    data, held_out = TrainingData.open_split(
        config,
        share=strategy.held_out_share(),
        optim=optim,
        normalisation=network.normalisation,
        seed=config.seed,
        device=device,
        dataset=dataset,
    )
    trainer = Trainer(
        network=network,
        data=data,
        run=run,
        optim=optim,
        strategy=strategy,
        phase=phase,
        seed=config.seed,
        device=device,
        held_out=held_out,
        sync_norms=config.sync_norms,
        validate=lambda current: headline(evaluate(current, config, validation, device=device)),
    )
    trainer.fit()
    if run.writes:
        save_weights(run.weights_path, network)
    run.write_text(run.architecture_path.name, network.architecture().to_json())
    result = evaluate(
        network,
        config,
        validation,
        device=device,
        on_predictions=lambda found: save_predictions(run, found),
    )
    result["train_seconds"] = trainer.seconds
    result["train_precision"] = trainer.precision
    result["train_cpu_seconds"] = trainer.cpu_seconds
    result["train_steps"] = trainer.step
    result["train_processes"] = place().ranks
    result["train_wait_seconds"] = data.wait_seconds
    result["skipped_steps"] = trainer.skipped_steps
    unreadable = dict(data.loader.unreadable)
    if held_out is not None:
        unreadable.update(held_out.loader.unreadable)
        result["train_persons"] = len(data.loader.rows)
        result["held_out_persons"] = len(held_out.loader.rows)
        result["skipped_architecture_steps"] = trainer.skipped_architecture_steps
    unreadable = {file: why for found in gather(unreadable) for file, why in found.items()}
    result["unreadable_train_files"] = len(unreadable)
    if unreadable:
        _log.warning("%d unreadable training pictures were skipped", len(unreadable))
    run.write_json("evaluation.json", result)
    run.log(
        {
            "phase": phase,
            "step": trainer.step,
            **{f"val_{k}": v for k, v in headline(result).items()},
        }
    )
    run.set_state("finished", train_seconds=trainer.seconds)
    return result


def choose_path(network: PoseNetwork, config: Config, device: torch.device) -> None:
    """Switch a network to the path that ``model.path`` names, where the device has it."""
    if config.model.path == "compiled":
        compiled_path(network, device)
    elif config.model.path == "fast" and device.type == "cpu":
        fast_path(network)


def _check_loss(network: PoseNetwork, optim: OptimConfig, phase: str) -> None:
    """A network's raw outputs are logits or score maps, as its first training decided."""
    expected = "cross_entropy" if network.graph.head.scores == "softmax" else "mse"
    if optim.loss != expected:
        raise PosefabricError(
            f"{phase}.loss={optim.loss}: this network was made for {expected} (its outputs are "
            f"{'logits' if expected == 'cross_entropy' else 'score maps'}); set "
            f"{phase}.loss={expected}"
        )


def evaluate(
    network: PoseNetwork,
    config: Config,
    dataset: PersonDataset,
    *,
    device: torch.device | None = None,
    flip: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """All measures of a network on a data set, under the configuration's options.

    ``flip``: none, as ``evaluation.flip_test``. ``options`` as in evaluate_network.
    """
    if config.data.channel_order != network.graph.channel_order:
        raise PosefabricError(
            f"data.channel_order={config.data.channel_order}: this network was trained on "
            f"{network.graph.channel_order}; leave the option out"
        )
    return evaluate_network(
        network,
        dataset,
        geometry=make_geometry(config.data),
        codec=make_codec(config.data),
        normalisation=network.normalisation,
        flip=config.evaluation.flip_test if flip is None else flip,
        device=device,
        on_bad_image=config.data.on_bad_image,
        **{**measure_options(config), **options},
    )


def measure_options(config: Config) -> dict[str, Any]:
    """How the options want predictions measured: arguments of evaluate_predictions."""
    chosen, rules = config.evaluation, make_conventions(config.data)
    return {
        "score_threshold": chosen.rescore_threshold,
        "nms_threshold": chosen.nms_threshold,
        "nms_area": chosen.nms_area or rules.nms_area,
        "box_padding": rules.box_padding,
        "pck_threshold": chosen.pck_threshold,
        "pckh_threshold": chosen.pckh_threshold,
        "legacy_pckh": chosen.legacy_pckh,
    }


def headline(result: dict[str, Any]) -> dict[str, float]:
    """The few numbers of an evaluation that a log line carries."""
    numbers = {}
    if result.get("pck"):
        numbers["PCK"] = result["pck"]["PCK"]
        if result["pck"].get("limbs") is not None:
            numbers["PCK_limbs"] = result["pck"]["limbs"]
    if result.get("pckh"):
        numbers["PCKh"] = result["pckh"]["Mean"]
    if result.get("oks"):
        numbers["AP"] = result["oks"]["AP"]
    return {name: round(float(value), 6) for name, value in numbers.items() if value is not None}
