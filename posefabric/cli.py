"""The command line: one thin command per stage; heavy imports inside the handlers."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from posefabric import __version__
from posefabric.cli_bench import bench, latency
from posefabric.cli_data import data_app
from posefabric.cli_output import counter, print_table, say
from posefabric.cli_output import show as show_table
from posefabric.cli_posenfs import import_posenfs, reference
from posefabric.cli_study import oracle, paper, study
from posefabric.cli_train import Out, RunPath, derive, search, train
from posefabric.distributed import from_first, is_first, joined, launched
from posefabric.structures import PosefabricError

app = App(
    name="posefabric",
    help="Search, train and ship small part-specific pose networks.",
    version=__version__,
    default_parameter=Parameter(negative=()),
)
app.command(data_app)
app.command(search)
app.command(derive)
app.command(train)
app.command(import_posenfs)
app.command(reference)
app.command(paper)
app.command(study)
app.command(oracle)
app.command(bench)
app.command(latency)

# What several processes started by torchrun can do together.
TOGETHER = ("search", "train", "derive", "eval")

Which = Annotated[str, Parameter(help="auto (newest compact), mixture, compact or a child's name")]


@app.command(name="eval")
def evaluate(
    run: RunPath,
    /,
    *overrides: str,
    which: Which = "auto",
    split: Literal["train", "val", "test"] = "val",
    no_flip: bool = False,
    submission: Path | None = None,
) -> None:
    """Evaluate a run's network: PCK, PCKh, AP and AR by joint and part.

    Boxes come from the ground truth, or from the detections file of data.boxes.

    Parameters
    ----------
    submission
        Also write the predictions as a test server takes them: a .json for COCO, a .mat for
        MPII. The split may then have no keypoints.
    """
    from posefabric.config import with_overrides
    from posefabric.data.pipeline import open_dataset
    from posefabric.deploy.run_report import shipped_network
    from posefabric.evaluate.profile import profile
    from posefabric.evaluate.submission import check_submission
    from posefabric.run import RunFolder
    from posefabric.train.phase import evaluate as run_evaluate

    chosen = RunFolder.open(run, writes=is_first()).resolve(which)
    say(f"evaluating {chosen.describe()}")
    config = with_overrides(chosen.config, overrides)
    dataset = open_dataset(config.data, split, boxes=config.data.boxes, evaluating=True)
    if submission is not None:
        check_submission(dataset, submission)
    network = shipped_network(chosen)
    result = run_evaluate(
        network,
        config,
        dataset,
        flip=False if no_flip else None,
        progress=counter("persons"),
        submission=submission,
    )
    result["profile"] = from_first(lambda: profile(network, config.data.input_wh))
    print_table(result)
    cost = result["profile"]
    say(
        f"{cost['params'] / 1e6:.2f} M parameters, {cost['macs'] / 1e6:.0f} M MACs, "
        f"{cost['latency_ms']:.1f} ms a picture in eager torch"
    )
    path = chosen.write_json(f"evaluation-{split}.json", result)
    say(f"written: {path}")
    if submission is not None:
        facts = ", ".join(f"{key} {value}" for key, value in result["submission"].items())
        say(f"written: {submission} ({facts})")


@app.command
def predict(
    run: RunPath,
    /,
    *inputs: str,
    out: Annotated[Path, Parameter(help="folder for predictions.json and overlays")],
    boxes: Path | None = None,
    which: Which = "auto",
    box_score: float = 0.0,
    threshold: float = 0.2,
    no_overlays: bool = False,
    input_wh: tuple[int, int] | None = None,
) -> None:
    """Find joints in pictures: COCO-style JSON and overlays.

    Parameters
    ----------
    run
        A run folder, or a model.onnx or model.xml (OpenVINO), which need no torch.
    inputs
        Pictures, folders or globs.
    boxes
        COCO-style annotations or detections with a box for each person; without it each
        picture is one person.
    box_score
        Leave out detected boxes with a lower score; detectors list many weak ones.
    threshold
        Draw joints from this score on.
    input_wh
        Width and height of the network's input, of a file exported with --dynamic-size.
    """
    from posefabric.deploy.prediction_files import predict_files

    if run.suffix == ".onnx":
        from posefabric.deploy.onnx_predictor import OnnxPoseEstimator

        estimator = OnnxPoseEstimator(run, input_wh=input_wh)
    elif run.suffix == ".xml":
        from posefabric.deploy.openvino_predictor import OpenvinoPoseEstimator

        estimator = OpenvinoPoseEstimator(run, input_wh=input_wh)
    elif input_wh is not None:
        raise PosefabricError(
            "--input-wh is for files exported with --dynamic-size; a run's network has its own"
        )
    else:
        from posefabric.deploy.predictor import PoseEstimator

        estimator = PoseEstimator.load(run, which=which)
        say(f"predicting with {estimator.source}")
    summary = predict_files(
        estimator,
        list(inputs),
        out,
        boxes_json=boxes,
        box_score_threshold=box_score,
        overlays=not no_overlays,
        threshold=threshold,
    )
    say(", ".join(f"{key}: {value}" for key, value in summary.items()))
    if not summary["pictures"]:
        raise PosefabricError("none of the pictures could be read; see the warnings above")


@app.command
def export(
    run: RunPath,
    /,
    *overrides: str,
    out: Path | None = None,
    which: Which = "auto",
    no_decode: Annotated[bool, Parameter(help="leave decoding to the predictor")] = False,
    dynamic_size: bool = False,
    quantize: Literal["int8", "bf16"] | None = None,
    openvino: bool = False,
    max_loss: float = 0.5,
    no_measure: bool = False,
) -> None:
    """Export to ONNX and OpenVINO; check against torch, measure accuracy and latency.

    Every file is compared with torch on validation pictures, measured on the validation persons
    through its own runtime, and timed: the table is printed, in model.json, and in the report.

    Parameters
    ----------
    out
        The ONNX file, none: model.onnx in the run; the other files lie beside it.
    dynamic_size
        Input height and width are free, in steps of 32 pixels; the predictor decodes.
    quantize
        Also write the network in int8 (calibrated on training persons), or, with --openvino and
        on a CPU that has it, in bf16.
    openvino
        Also write model.xml and model.bin.
    max_loss
        A quantised file that loses more points of PCK or AP is not written; exit code 1.
    no_measure
        Only check against torch.
    """
    from posefabric.deploy.export_text import printable
    from posefabric.deploy.run_export import export_run
    from posefabric.run import RunFolder

    opened = RunFolder.open(run)
    chosen = opened.resolve(which).overridden(overrides)
    say(f"exporting {chosen.describe()}")
    result = export_run(
        chosen,
        out or opened.onnx_path,
        decode=not no_decode,
        dynamic_size=dynamic_size,
        quantize=quantize,
        openvino=openvino,
        max_loss=max_loss,
        measure=not no_measure,
        progress=counter("persons"),
    )
    for key, value in result.check.items():
        say(f"{key}: {value}")
    for row in result.recipes:
        taken = ", taken" if row["chosen"] else ""
        say(f"int8, {row['recipe']}: maxima move {row['moved_cells']:.3f} heatmap cells{taken}")
    for name, check in result.checks.items():
        facts = ", ".join(f"{key} {value:.3g}" for key, value in check.items())
        say(f"{name} against torch: {facts}")
    if result.table is not None:
        show_table(printable(result.table))
    for path in result.files:
        say(f"written: {path}")
    if result.refused:
        raise PosefabricError("\n".join(result.refused))


@app.command
def show(run: str, /, *overrides: str, which: Which = "auto", no_report: bool = False) -> None:
    """Show a run: its architecture, its costs, and report.html. `show configs` lists configs.

    Parameters
    ----------
    run
        A run folder, or the word configs.
    """
    from posefabric.config import load_config, shipped_configs

    if run == "configs":
        for name in shipped_configs():
            config = load_config(name)
            facts = f"{config.data.skeleton}, P={config.model.parts}, {config.model.backbone}"
            say(f"{name:>20}  {facts}")
        return
    from posefabric.deploy.metro import architecture_image, describe_architecture
    from posefabric.deploy.run_report import build_report, measure, stages, summary_table
    from posefabric.run import RunFolder
    from posefabric.space.architecture import Architecture
    from posefabric.space.baseline import load_graph

    opened = RunFolder.open(run)
    chosen = opened.resolve(which)
    graph = load_graph(chosen.architecture_path)
    say(chosen.describe())
    say(describe_architecture(graph))
    if isinstance(graph, Architecture):
        path = opened.write_bytes("architecture.png", architecture_image(graph, format="png"))
        say(f"drawn: {path}")
    if not no_report:
        measured = measure(stages(opened, overrides))
        show_table(summary_table(measured))
        say(f"report: {build_report(opened, measured, overrides)}")


@app.command
def demo(*overrides: str, out: Out = Path("runs/demo")) -> None:
    """The whole story on synthetic people: search, derive, evaluate, export, report."""
    from posefabric.deploy.demo import run_demo

    started = time.perf_counter()
    run_demo(out, overrides, say=say, show=show_table)
    say(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")


def main() -> None:
    """The console script: user errors are one message, without a traceback."""
    # OpenMP reads it when torch loads. Threads that wait soon sleep: those that spin, the default,
    # halve a training's speed beside any other job, and gain little alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        launch = launched()
        # What all processes would say is said once.
        level = logging.WARNING if launch.rank == 0 else logging.ERROR
        logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
        if launch.ranks > 1:
            # A lost connection is told in our words, without torch's stack traces.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if launch.ranks > 1 and sys.argv[1:2] not in [[name] for name in TOGETHER]:
            raise PosefabricError(
                f"posefabric {' '.join(sys.argv[1:2])}: runs in one process, without torchrun; "
                f"several can {', '.join(TOGETHER)}"
            )
        with joined(launch):
            app()
    except PosefabricError as error:
        if not getattr(error, "told", False):
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(_exit_code(error)) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _exit_code(error: PosefabricError) -> int:
    return 130 if type(error).__name__ == "TrainingStopped" else 1
