"""The whole story in one command, on synthetic people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from posefabric.config import load_config
from posefabric.data.pipeline import open_dataset
from posefabric.data.synthetic import write_coco
from posefabric.deploy.export_text import printable
from posefabric.deploy.metro import architecture_image
from posefabric.deploy.prediction_files import predict_files
from posefabric.deploy.predictor import PoseEstimator
from posefabric.deploy.run_export import export_run
from posefabric.deploy.run_report import build_report, measure, stages, summary_table
from posefabric.derive.gap import gap_lines
from posefabric.derive.run_derive import derive, finetune
from posefabric.run import RunFolder
from posefabric.search.run_search import search
from posefabric.space.architecture import Architecture
from posefabric.structures import PosefabricError

PICTURES = 12


def run_demo(
    out: Path,
    overrides: Sequence[str],
    *,
    say: Callable[[str], None],
    show: Callable[[object], None],
) -> RunFolder:
    """Search, derive, fine-tune, measure, export, predict and report into ``out``.

    A demo that was stopped goes on where it was; a finished one is said to be there.
    """
    config = load_config("demo", overrides)
    run = RunFolder.create(out, config=config, kind="search", exist_ok=(out / "run.json").exists())
    if run.report_path.is_file():
        raise PosefabricError(f"{out}: holds a finished demo; delete it or choose another --out")
    if run.state != "finished":
        say(
            f"1. Search: a mixture of all architectures learns on {config.data.synthetic_train} "
            f"synthetic people"
        )
        search(run)
    children = {child.kind: child for child in run.descendants().values()}
    if "derive" not in children or children["derive"].state != "finished":
        say("2. Derive: what weighs nothing goes")
        children["derive"] = run.new_child("derive", config)
        _, record = derive(run, children["derive"])
        for step, counts in record["steps"].items():
            say(f"   {step}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))
        for line in gap_lines(record["accuracy"]):
            say(f"   {line}")
    if "train" not in children or children["train"].state != "finished":
        say("3. Fine-tune: the compact network trains on")
        if "train" not in children:
            children["train"] = children["derive"].new_child("train", config)
        finetune(children["derive"], children["train"])
    compact = children["train"]
    say("4. Measure both")
    measured = measure(stages(run))
    show(summary_table(measured))
    say("5. Export to ONNX, and check it with onnxruntime")
    exported = export_run(compact, run.onnx_path)
    for key, value in exported.check.items():
        say(f"   {key}: {value}")
    if exported.table is not None:
        show(printable(exported.table))
    say("6. Find joints in new pictures")
    fresh = open_dataset(config.data, "test")
    pictures = out / "pictures"
    few = type(fresh)(
        name=fresh.name,
        skeleton=fresh.skeleton,
        persons=fresh.persons[:PICTURES],
        read_image=fresh.read_image,
    )
    annotations = write_coco(few, pictures, "new")
    predict_files(
        PoseEstimator.load(run.path),
        [str(pictures / "new")],
        run.path / "predictions",
        boxes_json=annotations,
    )
    graph = Architecture.load(compact.architecture_path)
    run.write_text("compact_architecture.json", graph.to_json())
    run.write_bytes("compact_architecture.png", architecture_image(graph, format="png"))
    report = build_report(run, measured)
    for what, where in (
        ("mixture", run.architecture_path),
        ("compact", run.path / "compact_architecture.json"),
        ("ONNX", exported.path),
        ("overlays", run.overlays_dir),
        ("pictures", run.path / "predictions"),
        ("report", report),
    ):
        say(f"   {what:>8}: {where}")
    return run
