"""What a run came to: networks compared in one measurement, pictures, report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from posefabric.config import Config
from posefabric.data.pipeline import make_codec, make_geometry, open_dataset
from posefabric.deploy.draw import prediction_sheet, save_png
from posefabric.deploy.ranking import rank_rows
from posefabric.deploy.report import write_report
from posefabric.deploy.report_sections import report_sections_from
from posefabric.derive.fold import deployable
from posefabric.evaluate.profile import compare
from posefabric.evaluate.runner import predict_dataset
from posefabric.models.build import load_network
from posefabric.models.network import PoseNetwork
from posefabric.run import RunFolder
from posefabric.space.baseline import load_graph
from posefabric.structures import PersonDataset, Predictions
from posefabric.train.phase import evaluate


def shipped_network(run: RunFolder) -> PoseNetwork:
    """The run's network as it is deployed: folded, a mixture as it is."""
    return deployable(load_network(run))


def stages(run: RunFolder, overrides: Sequence[str] = ()) -> dict[str, RunFolder]:
    """``mixture`` and, where there is one, ``compact``: the runs a report sets side by side.

    A baseline stands alone, under its own name. ``overrides``: options such as
    ``data.root=DIR`` to read them with.
    """
    newest = run.resolve("auto")
    if newest.config.model.network != "fabric":
        return {newest.config.model.network: newest.overridden(overrides)}
    mixture = run.resolve("mixture")
    found = {"mixture": mixture}
    if newest.kind != "search":
        found["compact"] = newest
    return {name: found_run.overridden(overrides) for name, found_run in found.items()}


def measure(runs: dict[str, RunFolder], *, repeats: int = 40) -> dict[str, dict[str, Any]]:
    """Evaluation, profile and architecture of each run's network, latencies in one run."""
    networks = {name: shipped_network(run) for name, run in runs.items()}
    config = next(iter(runs.values())).config
    profiles = compare(networks, config.data.input_wh, repeats=repeats)
    measured = {}
    for name, run in runs.items():
        measured[name] = {
            "evaluation": evaluation_of(run, networks[name]),
            "profile": profiles[name],
            "architecture": load_graph(run.architecture_path),
        }
    return measured


def evaluation_of(run: RunFolder, network: PoseNetwork) -> dict[str, Any]:
    """The run's own evaluation on the validation persons; made now where there is none."""
    if (run.path / "evaluation.json").is_file():
        return run.read_json("evaluation.json")
    result = evaluate(network, run.config, open_dataset(run.config.data, "val"))
    run.write_json("evaluation.json", result)
    return result


def summary_table(measured: dict[str, dict[str, Any]]) -> Table:
    """PCK, AP, parameters, MACs and milliseconds of each network."""
    table = Table(title=" and ".join(measured).capitalize().replace("_", " "))
    for column in ("", "PCK@0.2, %", "AP, %", "params, M", "MACs, M", "head MACs, M"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("ms", justify="right")
    table.add_column("head ms", justify="right")
    for name, row in measured.items():
        pck, oks = row["evaluation"].get("pck"), row["evaluation"].get("oks")
        cost = row["profile"]
        table.add_row(
            name,
            f"{100 * pck['PCK']:.1f}" if pck and pck["PCK"] is not None else "-",
            f"{100 * oks['AP']:.1f}" if oks and oks["AP"] >= 0 else "-",
            f"{cost['params'] / 1e6:.2f}",
            f"{cost['macs'] / 1e6:.0f}",
            f"{cost['head_macs'] / 1e6:.1f}",
            f"{cost['latency_ms']:.2f}",
            f"{cost['head_latency_ms']:.2f}",
        )
    return table


def draw_sheets(
    run: RunFolder, network: PoseNetwork, *, folder: Path, count: int = 24
) -> dict[str, np.ndarray]:
    """Sheets of evenly drawn, best and worst validation persons, also saved in ``folder``."""
    config = run.config
    dataset = open_dataset(config.data, "val")
    predictions = predict(network, config, dataset)
    ranked = rank_rows(dataset, predictions)
    drawn = np.linspace(0, len(predictions.index) - 1, min(count, len(predictions.index)))
    rows = {
        "validation persons": [int(predictions.index[round(i)]) for i in drawn],
        "best": ranked[: count // 2],
        "worst": ranked[::-1][: count // 2],
    }
    sheets = {
        name: prediction_sheet(dataset, predictions, chosen)
        for name, chosen in rows.items()
        if chosen
    }
    for name, sheet in sheets.items():
        save_png(folder / f"{name.replace(' ', '_')}.png", sheet)
    return sheets


def predict(network: PoseNetwork, config: Config, dataset: PersonDataset) -> Predictions:
    """Every person of a data set under the run's options; unreadable pictures are left out."""
    return predict_dataset(
        network,
        dataset,
        geometry=make_geometry(config.data),
        codec=make_codec(config.data),
        normalisation=network.normalisation,
        flip=config.evaluation.flip_test,
        on_bad_image="skip",
    )


def build_report(
    run: RunFolder,
    measured: dict[str, dict[str, Any]] | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Write report.html into the run: what was searched, drawn, measured, and the pictures."""
    runs = stages(run, overrides)
    measured = measure(runs) if measured is None else measured
    newest = list(runs.values())[-1]
    top = next(iter(runs.values()))
    sheets = draw_sheets(newest, shipped_network(newest), folder=run.overlays_dir)
    onnx = newest.read_json("onnx_check.json") if _has(newest, "onnx_check.json") else None
    table = newest.read_json("export_table.json") if _has(newest, "export_table.json") else None
    sections = report_sections_from(
        facts=_facts(top, newest),
        networks=measured,
        records={name: lineage.metrics() for name, lineage in _lineage(newest).items()},
        pictures=sheets,
        onnx=onnx,
        shipped=table,
        commands=[f"posefabric {_command(step)}" for step in _lineage(newest).values()],
        environment=top.read_json("environment.json"),
    )
    return write_report(
        run.report_path,
        title=f"posefabric: {top.config.name}",
        lead=f"{top.path.name}, {top.created}",
        sections=sections,
    )


def _has(run: RunFolder, name: str) -> bool:
    return (run.path / name).is_file()


def _lineage(run: RunFolder) -> dict[str, RunFolder]:
    """The run and the runs it came from, oldest first."""
    chain = [run]
    while chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    return {step.kind: step for step in reversed(chain)}


def _parts(config: Config) -> str:
    parts = config.model.parts
    return ", ".join(parts) if isinstance(parts, dict) else str(parts)


def _command(run: RunFolder) -> str:
    recorded = run.read_json("run.json").get("command", "")
    return recorded.split("posefabric ", 1)[-1]


def _facts(top: RunFolder, newest: RunFolder) -> dict[str, Any]:
    config = top.config
    facts = {
        "skeleton": config.data.skeleton,
        "data": config.data.root or config.data.format,
        "input": " x ".join(map(str, config.data.input_wh)) + f", preset {config.data.preset}",
        "backbone": f"{config.model.backbone}, weights {config.model.weights}",
    }
    seconds = {step.kind: step.info.get("train_seconds", 0.0) for step in _lineage(newest).values()}
    trained = {
        "seed": config.seed,
        "minutes of training": ", ".join(f"{k} {v / 60:.1f}" for k, v in seconds.items() if v),
    }
    if config.model.network != "fabric":
        return facts | {"network": config.model.network, "loss": config.finetune.loss} | trained
    return facts | {
        "parts": _parts(config),
        "fabric": f"L={config.model.depth} from layer {config.model.first_layer}, "
        f"C={config.model.channel_factor}, H={config.model.hidden_nodes}, "
        f"{', '.join(config.model.operations)}",
        "strategy": f"{config.search.strategy}, {config.search.relaxation}",
        "loss": config.search.loss,
        **trained,
    }
