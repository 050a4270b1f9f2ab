"""Latency tables: pieces timed by themselves, fitted to whole networks, checked against others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from posefabric.budget import Budget
from posefabric.config import Config, DeriveConfig
from posefabric.data.codec import Codec
from posefabric.data.pipeline import make_codec
from posefabric.deploy.latency_pieces import REPEATED, Runtime, make_run, piece_runs
from posefabric.deploy.onnx_graph import ExportedNetwork
from posefabric.derive.draw import draw, kept
from posefabric.derive.fit_budget import backbone_piece, whole_cost
from posefabric.derive.fold import fold
from posefabric.evaluate.profile import interleaved, torch_threads
from posefabric.models.build import build_supernet
from posefabric.models.compact import build_compact
from posefabric.models.supernet import Supernet
from posefabric.run import RunFolder, write_atomic
from posefabric.run.environment import describe_environment
from posefabric.space.architecture import Architecture
from posefabric.space.latency import TABLE_NAME, LatencyTable, Piece, Recorder
from posefabric.structures import PosefabricError

FITTED = 10  # whole networks that the pieces' sums are fitted to
ROUNDS, WARMUP = 25, 3
SEED = 20240

Say = Callable[[str], None]


def ensure_table(run: RunFolder, config: Config, *, say: Say = lambda text: None) -> None:
    """Give a search run the table of a latency budget: ``search.latency_table``, or a new one.

    Nothing happens where there is one, or where no budget of ``config`` is on latency.
    """
    path = run.path / TABLE_NAME
    if not wants_table(config) or path.is_file():
        return
    if config.search.latency_table is not None:
        table = LatencyTable.load(Path(config.search.latency_table))
        _check_conditions(table, config)
    else:
        say(f"latency budget: timing this device's pieces in {config.search.latency_runtime}")
        table = measure_table(config, say=say)
    run.write_text(TABLE_NAME, table.to_json())


def _check_conditions(table: LatencyTable, config: Config) -> None:
    own = config.search
    wanted = {"runtime": own.latency_runtime, "threads": own.latency_threads}
    for name, value in wanted.items():
        if getattr(table, name) != value:
            raise PosefabricError(
                f"{own.latency_table}: was measured with {name} {getattr(table, name)}, but "
                f"search.latency_{name}={value}; set that option, or measure another table"
            )


def wants_table(config: Config) -> bool:
    """Whether a budget of the configuration is on latency."""
    budgets = (config.search.budget, config.derive.budget)
    return any(b is not None and Budget.parse(b).measure == "latency" for b in budgets)


def measure_table(config: Config, *, fitted: int = FITTED, say: Say) -> LatencyTable:
    """Time every piece of a configuration's search space, and fit the sums to whole networks.

    By ``search.latency_runtime`` and ``search.latency_threads``; for one picture. The networks
    are drawn at random from the space, by a fixed seed. Raises PosefabricError when the runtime
    is not installed, and for a fabric backbone.
    """
    runtime, threads = config.search.latency_runtime, config.search.latency_threads
    mixture = build_supernet(config, pretrained=False)
    if mixture.graph.backbone.fabric is not None:
        raise PosefabricError(
            f"model.backbone={config.model.backbone}: the pieces of a fabric backbone are not "
            f"timed; use a budget on macs or params"
        )
    pieces = sorted(space_pieces(mixture.graph))
    with torch_threads(threads):
        say(f"timing {len(pieces)} pieces, then {fitted} whole networks")
        ms = _time_pieces(pieces, runtime=runtime, threads=threads)
        graphs = list(random_architectures(mixture, fitted, seed=SEED))
        measured = time_networks(graphs, config)
    environment = describe_environment()
    packages = {**environment["packages"], "onnxruntime": _version_of(runtime)}
    raw = LatencyTable(
        ms=ms,
        runtime=runtime,
        threads=threads,
        device=environment["cpu"],
        packages=packages,
        input_wh=config.data.input_wh,
    )
    sums = [whole_cost(graph, raw).ms for graph in graphs]
    overhead, factor = fit_line(sums, measured)
    facts = {"networks": fitted, "rounds": ROUNDS, **agreement(
        [overhead + factor * value for value in sums], measured
    )}  # fmt: skip
    return replace(raw, factor=factor, overhead_ms=overhead, fitted=facts)


def check_table(table: LatencyTable, config: Config, *, count: int, seed: int = 0) -> LatencyTable:
    """The table with ``checked``: its predictions for ``count`` other derived architectures."""
    mixture = build_supernet(config, pretrained=False)
    graphs = list(random_architectures(mixture, count, seed=seed))
    with torch_threads(table.threads):
        measured = time_networks(graphs, config)
    predicted = [whole_cost(graph, table).ms for graph in graphs]
    facts: dict[str, Any] = {"networks": count, "seed": seed, **agreement(predicted, measured)}
    facts.update(predicted_ms=predicted, measured_ms=measured)
    return replace(table, checked=facts)


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """``median_error``: of |predicted / measured - 1|; ``spearman``: the rank correlation."""
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    return {
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "spearman": float(spearmanr(predicted, measured)[0]),  # type: ignore[arg-type]
    }


def fit_line(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(overhead, factor) of least squared relative errors; the factor above 0.

    The overhead corrects the backbone's time too, so that it may be negative.
    """
    x, y = np.asarray(sums, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    scaled = np.stack([1 / y, x / y], axis=1)
    (overhead, factor), *_ = np.linalg.lstsq(scaled, np.ones_like(y), rcond=None)
    if factor <= 0:
        ratio = x / y
        overhead, factor = 0.0, float((ratio.sum()) / (ratio**2).sum())
    return float(overhead), float(factor)


def space_pieces(graph: Architecture) -> set[Piece]:
    """Every piece that an architecture derived from a mixture's graph can have."""
    recorder = Recorder()
    whole_cost(graph, recorder)
    whole = backbone_piece(graph)
    # Derivation leaves out deep levels that nobody reads.
    fewer = range(1, whole.width_out)
    cut = {Piece(whole.kind, whole.name, 3, levels, whole.size) for levels in fewer}
    return recorder.pieces | cut


def random_architectures(mixture: Supernet, count: int, *, seed: int) -> Iterator[Architecture]:
    """Architectures as derivation leaves them, from random alpha and beta, of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    for place in range(count):
        draw(mixture, generator)
        settings = DeriveConfig(operations_kept=1 + place % 3, sources_kept=1 + (place // 3) % 3)
        yield kept(mixture.architecture(), settings)


def time_networks(graphs: Sequence[Architecture], config: Config) -> list[float]:
    """Median milliseconds of each graph's folded network, crops to score maps, interleaved."""
    width, height = config.data.input_wh
    crops = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    codec = make_codec(config.data)
    runs = {
        str(place): {"whole": make_run(
            _Maps(graph, codec), (crops,),
            runtime=config.search.latency_runtime, threads=config.search.latency_threads,
        )}
        for place, graph in enumerate(graphs)
    }  # fmt: skip
    times = interleaved(runs, repeats=ROUNDS, warmup=WARMUP)
    return [statistics.median(times[str(place)]["whole"]) for place in range(len(graphs))]


class _Maps(ExportedNetwork):
    """A graph's network as it is shipped, but for the decoding."""

    def __init__(self, graph: Architecture, codec: Codec) -> None:
        network = fold(build_compact(graph).eval())
        super().__init__(network, normalisation=network.normalisation, codec=codec, decode=False)


def _time_pieces(pieces: Sequence[Piece], *, runtime: Runtime, threads: int) -> dict[str, float]:
    runs = {str(p): piece_runs(p, runtime=runtime, threads=threads) for p in pieces}
    times = interleaved(runs, repeats=ROUNDS, warmup=WARMUP)
    found = {}
    for piece in pieces:
        own = {kind: statistics.median(values) for kind, values in times[str(piece)].items()}
        alone = piece.kind == "backbone"
        spent = own["with"] if alone else (own["with"] - own["without"]) / REPEATED
        found[str(piece)] = max(0.0, spent)
    return found


def write_table(table: LatencyTable, path: Path) -> None:
    """Write a table where `search.latency_table` can name it."""
    write_atomic(path, table.to_json().encode())


def _version_of(runtime: Runtime) -> str | None:
    if runtime == "torch":
        return None
    import onnxruntime

    return str(onnxruntime.__version__)
