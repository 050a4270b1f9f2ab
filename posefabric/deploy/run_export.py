"""A run's network as files for each runtime, checked and measured on the run's own pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from posefabric.data.pipeline import has_data, open_dataset
from posefabric.deploy.export import export_onnx, require_export
from posefabric.deploy.export_check import check_crops, differences, require_same, run_torch
from posefabric.deploy.export_table import Variant, export_table
from posefabric.deploy.export_text import MEASURES
from posefabric.deploy.exported import ExportedPoseEstimator
from posefabric.deploy.exported_evaluation import evaluate_exported
from posefabric.deploy.onnx_graph import exported_network, get_metadata
from posefabric.deploy.onnx_predictor import OnnxPoseEstimator
from posefabric.deploy.openvino_export import convert, require_bf16
from posefabric.deploy.openvino_predictor import OpenvinoPoseEstimator, require_openvino
from posefabric.deploy.quantize import choose_int8
from posefabric.deploy.run_crops import person_crops
from posefabric.deploy.run_report import shipped_network
from posefabric.run import RunFolder, write_atomic
from posefabric.run.files import json_bytes
from posefabric.skeletons import load_skeleton
from posefabric.structures import PosefabricError
from posefabric.train.phase import headline

CHECKED_PERSONS = 16
CALIBRATED_PERSONS = 256
CHOOSING_PERSONS = 64  # more training persons, to choose what stays float by
BATCH = 16

Quantize = Literal["int8", "bf16"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Export:
    """What an export came to.

    Attributes:
        path: the float ONNX file.
        check: its facts and differences from torch.
        files: every file that was written.
        checks: differences from torch of every variant, by its name.
        table: of export_table; None: not measured.
        recipes: how int8 was chosen.
        refused: one message for each file that was not written.
    """

    path: Path
    check: dict[str, Any]
    files: list[Path]
    checks: dict[str, dict[str, float]] = field(default_factory=dict)
    table: dict[str, Any] | None = None
    recipes: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def export_run(
    run: RunFolder,
    path: Path,
    *,
    decode: bool = True,
    dynamic_size: bool = False,
    quantize: Quantize | None = None,
    openvino: bool = False,
    max_loss: float = 0.5,
    measure: bool = True,
    progress: Progress | None = None,
) -> Export:
    """Write ``path`` (model.onnx) and what else is asked for beside it.

    Beside model.onnx: model.int8.onnx (``quantize="int8"``), model.xml and .bin (``openvino``),
    with both also model.int8.xml; model.bf16.xml with ``quantize="bf16"``, and model.json, the
    table. Each is compared with torch on the first validation persons, measured on all of them
    through its own runtime, and timed.

    Int8 is calibrated on training persons, and what stays float chosen on others of them
    (see choose_int8). A quantised file that loses more than ``max_loss`` points of any measure
    against the float file is not written, and told in ``refused``.

    Args:
        measure: without it there is no table, and no quantised file either.

    Raises PosefabricError when something is missing (extra, data, bf16 arithmetic) or does not
    fit; as export_onnx and, for pictures, open_dataset.
    """
    config = run.config
    _check_request(run, quantize=quantize, openvino=openvino, measure=measure, max_loss=max_loss)
    network = shipped_network(run)
    data = has_data(config.data)
    crops = person_crops(config, "val", CHECKED_PERSONS, seed=None) if data else None
    check = export_onnx(
        network,
        path,
        config=config,
        skeleton=load_skeleton(config.data.skeleton),
        decode=decode and not dynamic_size,
        crops=crops,
        dynamic_size=dynamic_size,
    )
    run.write_json("onnx_check.json", check)
    if not measure and not openvino:
        return Export(path, check, [path])
    module = exported_network(network.cpu(), config, decode=decode and not dynamic_size)
    pixels, _ = check_crops(crops, config.data.input_wh)
    expected = run_torch(module, pixels)
    recipes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files, recipes = _make_files(run, path, Path(folder), quantize=quantize, openvino=openvino)
        variants = []
        for name, made in files.items():
            variant = _open(name, made, path.with_name(made.name))
            variant.check = differences(
                _all_outputs(variant.estimator), pixels, expected, module.outputs
            )
            if "fp32" in name:
                require_same(variant.check, what=f"{variant.path}: not written: {name}")
            variants.append(variant)
        table = None
        if measure:
            conditions = _measure(run, variants, progress=progress) if data else {}
            table = export_table(variants, module, pixels, conditions=conditions)
            if recipes:
                table["int8_recipes"] = recipes
        refused = _refused(variants, max_loss)
        written = [path]
        for variant in variants:
            if variant.name in refused or variant.path == path:
                continue
            written += _write(files[variant.name], variant.path)
    if table is not None:
        for row in table["rows"]:
            row["written"] = row["variant"] not in refused
        write_atomic(path.with_suffix(".json"), json_bytes(table))
        written.append(path.with_suffix(".json"))
        run.write_json("export_table.json", table)
    return Export(
        path,
        check,
        written,
        checks={variant.name: variant.check for variant in variants[1:]},
        table=table,
        recipes=recipes,
        refused=list(refused.values()),
    )


def _check_request(
    run: RunFolder, *, quantize: Quantize | None, openvino: bool, measure: bool, max_loss: float
) -> None:
    """What must hold, asked before anything is written."""
    require_export()
    if openvino:
        require_openvino()
    if max_loss < 0:
        raise PosefabricError(f"max_loss: expected points of 0 or more, got {max_loss}")
    if quantize is None:
        return
    if quantize == "bf16" and not openvino:
        raise PosefabricError(
            "--quantize bf16: onnxruntime has no convolutions in bf16 for the CPU; add --openvino, "
            "or take --quantize int8"
        )
    if quantize == "bf16":
        require_bf16()
    if not measure:
        raise PosefabricError(
            f"--quantize {quantize}: a quantised file is only written with its loss measured; "
            "leave out --no-measure"
        )
    if not has_data(run.config.data):
        raise PosefabricError(
            f"{run.path}: --quantize {quantize} needs training pictures to calibrate on and "
            "validation pictures to measure the loss on, and this run names no data; give it: "
            "data.root=DIR"
        )


def _make_files(
    run: RunFolder, path: Path, folder: Path, *, quantize: Quantize | None, openvino: bool
) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Variant name to file, the float ONNX first, and the recipes tried for int8."""
    import onnx

    model = path.read_bytes()
    stem = path.stem
    metadata = get_metadata(onnx.load_from_string(model))
    files = {"onnxruntime fp32": path}
    recipes: list[dict[str, Any]] = []
    if openvino:
        files["openvino fp32"] = convert(model, folder / f"{stem}.xml", metadata=metadata)
    if quantize == "int8":
        count = CALIBRATED_PERSONS + CHOOSING_PERSONS
        training = person_crops(run.config, "train", count, seed=run.config.seed)
        # Of a few persons a fifth chooses, at least one.
        split = len(training) - max(1, min(CHOOSING_PERSONS, len(training) // 5))
        int8, recipes = choose_int8(model, training[:split], training[split:])
        files["onnxruntime int8"] = folder / f"{stem}.int8.onnx"
        write_atomic(files["onnxruntime int8"], int8)
        if openvino:
            target = folder / f"{stem}.int8.xml"
            facts = get_metadata(onnx.load_from_string(int8))
            files["openvino int8"] = convert(int8, target, metadata=facts)
    if quantize == "bf16":
        facts = {**metadata, "precision": "bf16"}
        files["openvino bf16"] = convert(model, folder / f"{stem}.bf16.xml", metadata=facts)
    return files, recipes


def _open(name: str, file: Path, target: Path) -> Variant:
    # The same number of threads for all, torch's.
    threads = torch.get_num_threads()
    kind = OpenvinoPoseEstimator if file.suffix == ".xml" else OnnxPoseEstimator
    estimator: ExportedPoseEstimator = kind(file, threads=threads, batch_size=BATCH)
    size = sum(part.stat().st_size for part in _parts(file))
    return Variant(name=name, path=target, estimator=estimator, bytes=size, check={})


def _all_outputs(estimator: ExportedPoseEstimator) -> Callable[[np.ndarray], list[np.ndarray]]:
    session = estimator.session
    return lambda crops: session.run(crops, session.outputs)


def _measure(
    run: RunFolder, variants: list[Variant], *, progress: Progress | None
) -> dict[str, Any]:
    """Fill in the variants' measures; the conditions they were made under."""
    config = run.config
    dataset = open_dataset(config.data, "val")
    for variant in variants:
        result = evaluate_exported(variant.estimator, config, dataset, progress=progress)
        found = headline(result)
        # An AP of -1 says that there was nothing to find.
        variant.measures = {name: found[name] for name in MEASURES if found.get(name, -1.0) >= 0}
    return {
        "data": dataset.name,
        "persons": len(dataset.persons),
        "flip": config.evaluation.flip_test,
        "boxes": dataset.box_source,
    }


def _refused(variants: list[Variant], max_loss: float) -> dict[str, str]:
    """Variant name to message, of the quantised ones that lose too much."""
    refused = {}
    for variant in variants[1:]:
        losses = variant.losses(variants[0])
        if variant.name.endswith("fp32"):
            continue
        if not losses:
            refused[variant.name] = (
                f"{variant.path}: not written: the validation persons have no keypoints to "
                f"measure the loss of {variant.name} on"
            )
            continue
        name, worst = max(losses.items(), key=lambda item: item[1])
        if not worst <= max_loss:
            refused[variant.name] = (
                f"{variant.path}: not written: {variant.name} loses {worst:.2f} points of {name} "
                f"on the validation persons, more than --max-loss {max_loss:g}; allow more, or "
                f"ship {variants[0].path.name}"
            )
    return refused


def _parts(file: Path) -> list[Path]:
    return [file.with_suffix(".bin"), file] if file.suffix == ".xml" else [file]


def _write(file: Path, target: Path) -> list[Path]:
    # The weights first: an .xml is never there without its .bin.
    written = []
    for part in _parts(file):
        place = target.with_suffix(part.suffix) if file.suffix == ".xml" else target
        write_atomic(place, part.read_bytes())
        written.append(place)
    return written
