"""The commands about many configurations: the paper's experiments, studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from posefabric.cli_output import say, show
from posefabric.structures import PosefabricError


def paper(
    *overrides: str,
    run: Annotated[bool, Parameter(help="also train each for a few steps and evaluate it")] = False,
    mpii: Annotated[Path | None, Parameter(help="with --run: MPII in the HRNet layout")] = None,
    coco: Annotated[Path | None, Parameter(help="with --run: COCO in the official layout")] = None,
    out: Annotated[Path, Parameter(help="with --run: where the runs go")] = Path("runs/paper"),
    only: Annotated[str, Parameter(help="configurations whose names contain this")] = "",
) -> None:
    """Build each experiment of the paper; parameters and multiply-adds beside the published.

    Parameters
    ----------
    overrides
        With --run: options for every run, such as data.input_wh=[64,64].
    """
    from posefabric.study.paper import paper_configs, paper_rows
    from posefabric.study.paper_table import paper_table, reasons

    names = [name for name in paper_configs() if only in name]
    if not names:
        raise PosefabricError(f"--only {only}: no such configuration; there are {paper_configs()}")
    rows = []
    for row in paper_rows(names):
        rows.append(row)
        say(f"built {row.name}")
    show(paper_table(rows))
    for line in reasons(rows):
        say(line)
    unexplained = [row.name for row in rows if row.unexplained]
    if unexplained:
        raise PosefabricError(f"differ by more than 1 % without a reason: {', '.join(unexplained)}")
    if run:
        from posefabric.study.paper_run import run_briefly

        for name in names:
            say(run_briefly(name, out, mpii=mpii, coco=coco, overrides=overrides))


def study(
    file: str,
    /,
    *overrides: str,
    out: Annotated[Path, Parameter(help="the study folder to write, or to go on with")],
    jobs: Annotated[int, Parameter(help="runs side by side, each in a process of one thread")] = 1,
    table: Annotated[bool, Parameter(help="make no run, write the tables anew")] = False,
    final: Annotated[bool, Parameter(help="when all is made, read the test split, once")] = False,
) -> None:
    """Compare arms over seeds: make every missing run of a study, then write tables and verdicts.

    Parameters
    ----------
    file
        A shipped study (strategies_baselines, ablation) or a YAML file: see docs/study.md.
    overrides
        Options for every run, such as data.root=DIR; the folder remembers them.
    """
    from posefabric.study.study import run_study

    run_study(file, overrides, out=out, jobs=jobs, table=table, final=final, say=say)


def oracle(
    config: str,
    /,
    *overrides: str,
    out: Annotated[Path, Parameter(help="the folder to write, or to go on with")],
    strategies: Annotated[
        tuple[str, ...], Parameter(help="searches to hold against it", consume_multiple=True)
    ] = ("synchronous",),
    fused: Annotated[int, Parameter(help="architectures with several sources a cell, too")] = 0,
    seeds: int = 1,
) -> None:
    """Train every one-path architecture of one part's space; how well do searches rank them?

    Parameters
    ----------
    config
        A shipped name or a YAML file, with model.parts=1; finetune is each one's training.
    """
    from posefabric.study.oracle import run_oracle

    path = run_oracle(
        config,
        overrides,
        out=out,
        strategies=strategies,
        fused_count=fused,
        seeds=seeds,
        say=say,
    )
    say(path.read_text())
    say(f"written: {path}")
