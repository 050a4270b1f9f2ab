"""The commands that train: search, derive, train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from posefabric.cli_output import print_table, say
from posefabric.distributed import from_first, is_first
from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from posefabric.config import Config
    from posefabric.run import RunFolder

Out = Annotated[Path, Parameter(help="the run folder to write")]
Resume = Annotated[bool, Parameter(help="go on with the run in that folder, exactly")]
RunPath = Annotated[Path, Parameter(help="a run folder")]


def search(
    config: str | None = None,
    /,
    *overrides: str,
    out: Out,
    parts: str | None = None,
    budget: str | None = None,
    resume: Resume = False,
) -> None:
    """Search: train the mixture of all architectures, alpha and beta with it.

    Parameters
    ----------
    config
        A shipped name (see `posefabric show configs`) or a YAML file.
    parts
        The same as model.parts=...: a number, random:P, or learned:K, from the training persons.
    budget
        The same as search.budget=...: macs=0.3G, params=2M or latency=8ms, of the compact network.
    """
    from posefabric.search.run_search import search as run_search

    given = {"model.parts": parts, "search.budget": budget}
    overrides += tuple(f"{name}={value}" for name, value in given.items() if value is not None)

    run = _shared(lambda: _open_or_create(out, "search", config, overrides, resume=resume))
    if run.state == "finished":
        say(f"{run.path}: is finished already")
        return
    _shared(lambda: _with_table(run, run.config))
    network, result = _failing_marked(run, lambda: run_search(run))
    print_table(result)
    entropies = ", ".join(f"{k} {v:.3f}" for k, v in network.entropies().items())
    say(f"{entropies}; next: posefabric derive {out} --finetune")


def _with_table(run: RunFolder, config: Config) -> RunFolder:
    """The run, with the latency table that a budget of the configuration needs."""
    from posefabric.deploy.latency import ensure_table

    ensure_table(run, config, say=say)
    return run


def derive(
    run: RunPath, /, *overrides: str, budget: str | None = None, finetune: bool = False
) -> None:
    """Derive a compact network from a searched mixture, as a child run.

    Parameters
    ----------
    budget
        The same as derive.budget=...: macs=0.3G, params=2M or latency=8ms; by default the
        search's.
    finetune
        Train the compact network on, as `posefabric train` would.
    """
    from posefabric.config import with_overrides
    from posefabric.derive.gap import gap_lines
    from posefabric.derive.run_derive import check_derivable
    from posefabric.derive.run_derive import derive as run_derive
    from posefabric.run import RunFolder

    if budget is not None:
        overrides = (*overrides, f"derive.budget={budget}")

    def derived() -> tuple[Path, dict]:
        opened = RunFolder.open(run)
        check_derivable(opened)
        parent = opened.resolve("mixture")
        settings = with_overrides(parent.config, overrides)
        _with_table(parent, settings)
        child = parent.new_child("derive", settings)
        _, record = _failing_marked(child, lambda: run_derive(parent, child))
        return child.path, record

    path, record = from_first(derived)
    for step, counts in record["steps"].items():
        say(f"{step:>10}: " + ", ".join(f"{v} {k}" for k, v in counts.items()))
    for step, value in record["differences"].items():
        say(f"{step:>10}: outputs moved by {value:.2e} of the largest")
    for line in gap_lines(record["accuracy"]):
        say(line)
    say(
        f"derived: {path}: {record['macs'] / 1e6:.1f} M multiply-adds, "
        f"{record['params'] / 1e6:.2f} M parameters"
        + (f", {record['predicted_ms']:.2f} ms by the table" if record["predicted_ms"] else "")
        + (f", within {record['budget']}" if record["budget"] else "")
    )
    if finetune or RunFolder.open(path).config.derive.finetune:
        train(str(path))


def train(
    run: str | None = None,
    /,
    *overrides: str,
    out: Annotated[Path | None, Parameter(help="the run folder of a baseline to write")] = None,
    resume: Resume = False,
) -> None:
    """Train the newest compact network of a run on, as a child run; or a baseline from the start.

    Both follow the options of the section finetune.

    Parameters
    ----------
    run
        A run folder; with --out, a shipped name or a YAML file whose model.network is a baseline.
    """
    from posefabric.config import with_overrides
    from posefabric.derive.run_derive import finetune
    from posefabric.run import RunFolder

    if out is not None or _is_config(run):
        _train_baseline(run, overrides, out, resume=resume)
        return
    opened = RunFolder.open(str(run), writes=is_first())
    if resume:
        found = from_first(lambda: _unfinished_child(opened).path)
        child = RunFolder.open(found, writes=is_first())
        if child.config.model.network != "fabric" and child.parent is None:
            _train_baseline(None, overrides, child.path, resume=True)
            return
        settings = with_overrides(child.config, overrides)
        child = _shared(
            lambda: RunFolder.create(found, config=settings, kind="train", exist_ok=True)
        )
    else:
        compact = from_first(lambda: opened.resolve("compact").path)
        above = RunFolder.open(compact, writes=is_first())
        settings = with_overrides(above.config, overrides)
        child = _shared(lambda: above.new_child("train", settings))
    parent = child.parent
    if parent is None:
        raise PosefabricError(f"{child.path}: the run it was derived from is gone")
    say(f"training {parent.describe()} on, in {child.path}")
    _, result = _failing_marked(child, lambda: finetune(parent, child))
    print_table(result)


def _is_config(name: str | None) -> bool:
    """Whether ``posefabric train`` was given a configuration, not a run folder."""
    from posefabric.config import shipped_configs

    if name is None or Path(name).is_dir():
        return name is None
    return name in shipped_configs() or Path(name).suffix in (".yaml", ".yml") or "=" in name


def _train_baseline(
    config: str | None, overrides: tuple[str, ...], out: Path | None, *, resume: bool
) -> None:
    from posefabric.train.from_start import train_from_start

    if out is None:
        raise PosefabricError(
            "posefabric train: expected a run folder to train on, or --out RUN to train the "
            f"baseline of a configuration into, got {config or 'neither'}"
        )
    if config is not None and (Path(config) / "run.json").is_file():
        raise PosefabricError(
            f"{config}: is a run folder, whose trainings are its children; leave out --out"
        )
    run = _shared(lambda: _open_or_create(out, "train", config, overrides, resume=resume))
    if run.state == "finished":
        say(f"{run.path}: is finished already")
        return
    _, result = _failing_marked(run, lambda: train_from_start(run))
    print_table(result)
    say(f"next: posefabric eval {out}")


def _open_or_create(
    out: Path,
    kind: Literal["search", "train"],
    config: str | None,
    overrides: tuple[str, ...],
    *,
    resume: bool,
) -> RunFolder:
    from posefabric.config import check_trainable, load_config, with_overrides
    from posefabric.evaluate.groups import with_learned_parts
    from posefabric.run import RunFolder
    from posefabric.skeletons import load_skeleton

    if resume and config is None:
        found = RunFolder.open(out)
        settings = with_overrides(found.config, overrides)
    elif config is not None and "=" in config:
        settings = load_config(None, (config, *overrides))
    else:
        settings = load_config(config, overrides)
    check_trainable(settings, kind)
    settings = with_learned_parts(settings, say=say)
    # A mistake in the user's own file is told of that file, not of the run's copy.
    load_skeleton(settings.data.skeleton)
    for section, option in ((settings.data, "root"), (settings.model, "weights")):
        given = getattr(section, option)
        if given is not None and Path(given).exists():
            # Later commands may be given from another folder.
            setattr(section, option, str(Path(given).resolve()))
    return RunFolder.create(out, config=settings, kind=kind, exist_ok=resume)


def _shared(make: Callable[[], RunFolder]) -> RunFolder:
    """The first process makes or takes up the run; the others open it and write nothing."""
    from posefabric.run import RunFolder

    made: list[RunFolder] = []

    def make_first() -> Path:
        made.append(make())
        return made[0].path

    path = from_first(make_first)
    return made[0] if made else RunFolder.open(path, writes=False)


def _unfinished_child(run: RunFolder) -> RunFolder:
    candidates = [run, *run.descendants().values()]
    found = [r for r in candidates if r.kind == "train" and r.state != "finished"]
    if not found:
        raise PosefabricError(f"{run.path}: has no unfinished training to resume")
    return max(found, key=lambda r: r.created)


def _failing_marked(run: RunFolder, work):
    """Run a stage; a failure is written into the run's state before it is told."""
    try:
        return work()
    except BaseException:
        if run.state == "running":
            run.set_state("failed")
        raise
