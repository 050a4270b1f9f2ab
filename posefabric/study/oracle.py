"""An oracle: a small space trained architecture by architecture, and what searches say of it."""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from posefabric.config import Config, load_config, with_overrides
from posefabric.derive.gap import make_measure
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.build import build_supernet, load_network
from posefabric.models.compact import build_compact
from posefabric.models.supernet import Supernet
from posefabric.run import RunFolder, write_atomic
from posefabric.run.files import json_bytes
from posefabric.search.run_search import search
from posefabric.structures import PosefabricError
from posefabric.study.commands import shown
from posefabric.study.paths import Candidate, fused, likeliest, one_path
from posefabric.study.rows import ROWS_NAME, Row, append_row, read_rows
from posefabric.study.run_arm import derived_of, drawn_run, finetuned_of
from posefabric.study.verdicts import Verdict

RESAMPLES = 2000
Say = Callable[[str], None]


def run_oracle(
    config: str,
    overrides: Sequence[str],
    *,
    out: Path,
    strategies: Sequence[str],
    fused_count: int,
    seeds: int,
    say: Say,
) -> Path:
    """Train every architecture, search by every strategy, compare; path of oracle.md.

    Each architecture is derived from a mixture that has nothing else open, and trained by the
    section ``finetune``, all with the same ``seeds``. A finished training is a row in
    ``rows.jsonl`` and is not made again. Each search is ranked two ways: by the probability its
    alpha and beta give to an architecture, and by the accuracy an architecture has with the
    mixture's weights on ``derive.gap_persons`` persons.

    Raises PosefabricError where the space has more than one part or operation to choose.
    """
    settings = load_config(config, list(overrides))
    mixture = build_supernet(settings, pretrained=False)
    paths = one_path(mixture)
    candidates = [*paths, *fused(mixture, fused_count, seed=settings.seed)]
    rows = _train_all(candidates, settings, out, seeds=seeds, say=say)
    truth = {
        one.name: statistics.fmean(row["PCK"] for row in rows if row["name"] == one.name)
        for one in candidates
    }
    found = []
    for strategy in strategies:
        for seed in range(seeds):
            own = with_overrides(settings, [f"search.strategy={strategy}", f"seed={seed}"])
            say(f"search: {strategy}, seed {seed}")
            network = _searched(out / "searches" / f"{strategy}-s{seed}", own)
            found.append(_compared(strategy, seed, network, own, candidates, paths, truth))
    verdicts = [verdict for row in found for verdict in row["verdicts"]]
    write_atomic(out / "verdicts.json", json_bytes([verdict.as_json() for verdict in verdicts]))
    words = [config, *map(shown, overrides), "--strategies", *strategies]
    words += ["--fused", str(fused_count), "--seeds", str(seeds)]
    text = _markdown(candidates, truth, rows, found, shlex.join(words))
    write_atomic(out / "oracle.md", text.encode())
    return out / "oracle.md"


def _train_all(
    candidates: Sequence[Candidate], config: Config, out: Path, *, seeds: int, say: Say
) -> list[Row]:
    path = out / ROWS_NAME
    known, rows = read_rows(path), []
    for number, candidate in enumerate(candidates, 1):
        for seed in range(seeds):
            own = with_overrides(config, [f"seed={seed}"])
            key = _key(candidate, own)
            if key not in known:
                say(f"[{number}/{len(candidates)}] {candidate.name}, seed {seed}")
                known[key] = {"hash": key, "seed": seed, **_trained(candidate, own, out / key)}
                append_row(path, known[key])
                shutil.rmtree(out / key)
            rows.append(known[key])
    return rows


def _trained(candidate: Candidate, config: Config, path: Path) -> Row:
    try:
        finished = finetuned_of(
            derived_of(drawn_run(path, config, candidate.leave_only), config), config
        )
        result = finished.read_json("evaluation.json")
    finally:
        gc.unfreeze()
        gc.collect()
    if result["pck"] is None or result["pck"]["PCK"] is None:
        raise PosefabricError("the validation persons have no keypoints that count")
    return {"name": candidate.name, "macs": candidate.macs, "PCK": result["pck"]["PCK"]}


def _key(candidate: Candidate, config: Config) -> str:
    """Of all that the training depends on: the architecture and every option."""
    kept = sorted((c.part, c.row, c.edge or 0, *options) for c, options in candidate.kept.items())
    text = json.dumps([candidate.name, kept, config.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _searched(path: Path, config: Config) -> Supernet:
    run = RunFolder.create(path, config=config, kind="search", exist_ok=True)
    if run.state != "finished":
        search(run)
    network = load_network(run)
    assert isinstance(network, Supernet)
    return network.eval()


def _compared(
    strategy: str,
    seed: int,
    network: Supernet,
    config: Config,
    candidates: Sequence[Candidate],
    paths: list[Candidate],
    truth: dict[str, float],
) -> dict[str, Any]:
    best = likeliest(network, paths)
    accuracy = np.array([truth[one.name] for one in candidates])
    scores = {"probability": [one.log_likelihood(network) for one in candidates]}
    inherited = _inherited(network, config, candidates)
    if inherited is not None:
        scores["inherited weights"] = inherited
    verdicts = [
        _verdict(f"{strategy}, seed {seed}: the order by {name} is the oracle's", values, accuracy)
        for name, values in scores.items()
    ]
    better = sum(truth[one.name] > truth[best.name] for one in paths)
    return {
        "strategy": strategy,
        "seed": seed,
        "found": best.name,
        "rank": better + 1,
        "of": len(paths),
        "PCK": truth[best.name],
        "verdicts": verdicts,
    }


def _inherited(
    network: Supernet, config: Config, candidates: Sequence[Candidate]
) -> list[float] | None:
    measure = make_measure(config)
    if measure is None:
        return None
    state = {name: value.clone() for name, value in network.arch_parameters().items()}
    found = []
    for candidate in candidates:
        candidate.leave_only(network)
        compact = build_compact(prune(network.architecture()))
        transfer_weights(network, compact)
        found.append(measure(compact.eval())["PCK"])
        for name, parameter in network.arch_parameters().items():
            parameter.data.copy_(state[name])
    return found


def _verdict(claim: str, scores: Sequence[float], accuracy: np.ndarray) -> Verdict:
    """Kendall's tau-b, its interval over resampled architectures, p one-sided against no order."""
    values = np.asarray(scores)
    test = kendalltau(values, accuracy, alternative="greater")
    tau, p = float(test[0]), float(test[1])  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    taus = []
    for _ in range(RESAMPLES):
        rows = generator.integers(len(values), size=len(values))
        taus.append(kendalltau(values[rows], accuracy[rows])[0])
    known = np.array(taus)[np.isfinite(np.array(taus, dtype=np.float64))]
    if not np.isfinite(tau) or not len(known):
        return Verdict(claim, None, None, None, None, "Not decided: all scores are equal.")
    low, high = (float(v) for v in np.quantile(known, [0.025, 0.975]))
    holds = p < 0.05
    text = (
        f"{'Holds' if holds else 'Does not hold'}: Kendall's tau is {tau:.2f} "
        f"(95 % over architectures: {low:.2f} to {high:.2f}; p = {p:.2g})."
    )
    return Verdict(claim, tau, (low, high), p, holds, text)


def _markdown(
    candidates: Sequence[Candidate],
    truth: dict[str, float],
    rows: Sequence[Row],
    found: Sequence[dict[str, Any]],
    command: str,
) -> str:
    lines = [
        "# Oracle", "",
        f"{len(candidates)} architectures, seeds of each: {len(rows) // len(candidates)}.",
        "", "```bash", f"posefabric oracle {command} --out DIR", "```", "",
        "## What the searches found", "",
        "| strategy | seed | its one-path architecture | PCK | rank |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['strategy']} | {row['seed']} | {row['found']} | {100 * row['PCK']:.1f} | "
        f"{row['rank']} of {row['of']} |"
        for row in found
    ]
    lines += ["", "## How they rank all of them", ""]
    lines += [f"- **{v.claim}.** {v.text}" for row in found for v in row["verdicts"]]
    lines += ["", "## The architectures", "", "| | PCK | MACs, M |", "|---|---|---|"]
    lines += [
        f"| {one.name} | {100 * truth[one.name]:.1f} | {one.macs / 1e6:.0f} |"
        for one in sorted(candidates, key=lambda one: -truth[one.name])
    ]
    return "\n".join(lines) + "\n"
