"""The derive stage: from a searched mixture to a compact network, checked at each step."""

from __future__ import annotations

from typing import Any

import torch

from posefabric.budget import Budget
from posefabric.derive.discretize import discretize
from posefabric.derive.fit_budget import fit_budget, latency_table, whole_cost
from posefabric.derive.fold import fold
from posefabric.derive.gap import make_measure
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.build import build_supernet, load_network
from posefabric.models.compact import CompactNetwork, build_compact
from posefabric.models.network import PoseNetwork
from posefabric.models.supernet import Supernet
from posefabric.run import RunFolder
from posefabric.structures import PosefabricError
from posefabric.train.checkpoint import save_weights
from posefabric.train.phase import train_phase
from posefabric.train.strategy import Strategy


def check_derivable(run: RunFolder) -> None:
    """PosefabricError for the run of a baseline."""
    network = run.config.model.network
    if network != "fabric":
        raise PosefabricError(
            f"{run.path}: holds a {network}, in which there is nothing to derive; `posefabric "
            f"eval`, `export` and `predict` take it as it is"
        )


def derive(run: RunFolder, child: RunFolder) -> tuple[CompactNetwork, dict[str, Any]]:
    """Derive a compact network from the mixture of ``run`` into the folder ``child``.

    Writes architecture.json, the weights (not folded, so that they can be trained on), and
    derivation.json: what each step kept, how far outputs moved (largest difference over largest
    value on seeded noise) and what accuracy was left with inherited weights (``accuracy``: see
    gap.py). Returns the network and that record.
    """
    config = child.config
    check_derivable(run)
    measure = make_measure(config)
    mixture = load_network(run)
    if not isinstance(mixture, Supernet):
        raise PosefabricError(
            f"{run.path}: a {run.kind} run holds no mixture; derive from a search run"
        )
    whole = mixture.architecture()
    pruned = prune(whole)
    images = torch.randn(
        2, 3, *reversed(config.data.input_wh), generator=torch.Generator().manual_seed(0)
    )
    compact = _built(pruned, mixture)
    with torch.no_grad():
        expected = mixture.eval()(images)
        differences = {"prune": _difference(compact(images), expected)}
    accuracy: dict[str, dict[str, float]] = {}
    if measure is not None:
        accuracy = {"mixture": measure(mixture), "prune": measure(compact)}
    graph = pruned
    steps = {"mixture": count_choices(whole), "prune": count_choices(pruned)}
    settings = config.derive
    if settings.threshold > 0:
        graph = prune(graph, threshold=settings.threshold)
        steps["threshold"] = count_choices(graph)
    if settings.operations_kept is not None or settings.sources_kept is not None:
        graph = prune(
            discretize(
                graph,
                operations_kept=settings.operations_kept,
                sources_kept=settings.sources_kept,
            )
        )
        steps["discretize"] = count_choices(graph)
    budget = settings.budget or config.search.budget
    table = latency_table(run, budget)
    if budget is not None:
        graph = fit_budget(graph, Budget.parse(budget), table)
        steps["budget"] = count_choices(graph)
    if graph != pruned:
        compact = _built(graph, mixture)
        with torch.no_grad():
            differences["discretize"] = _difference(compact(images), expected)
        if measure is not None:
            accuracy["discretize"] = measure(compact)
    folded = fold(compact)
    with torch.no_grad():
        differences["fold"] = _difference(folded(images), compact(images))
    if measure is not None:
        accuracy["fold"] = measure(folded)
    if not settings.inherit:
        # What the search is worth as an architecture alone, as papers retrain what they found.
        compact = _built(graph, build_supernet(config))
    cost = whole_cost(graph, table)
    record = {
        "inherited": settings.inherit,
        "steps": steps,
        "differences": differences,
        "accuracy": accuracy,
        "parent": run.path.name,
        "macs": cost.macs,
        "params": cost.params,
        "predicted_ms": cost.ms if table is not None else None,
        "budget": budget,
    }
    child.write_text(child.architecture_path.name, graph.to_json())
    save_weights(child.weights_path, compact)
    child.write_json("derivation.json", record)
    child.set_state("finished")
    return compact, record


def finetune(run: RunFolder, child: RunFolder) -> tuple[PoseNetwork, dict[str, Any]]:
    """Train the compact network, or the baseline, of ``run`` on, in the folder ``child``."""
    network = load_network(run)
    if isinstance(network, Supernet):
        raise PosefabricError(f"{run.path}: holds a mixture; `posefabric derive` it first")
    config = child.config
    if config.model.frozen_stem:
        network.backbone.freeze_to_stride_4()
    result = train_phase(
        network, run=child, optim=config.finetune, strategy=Strategy(), phase="finetune"
    )
    return network, result


def _built(graph: Any, mixture: Supernet) -> CompactNetwork:
    compact = build_compact(graph)
    transfer_weights(mixture, compact)
    return compact.eval()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def count_choices(graph: Any) -> dict[str, int]:
    """Cells, sources and operations that a graph keeps."""
    cells = [cell for part in graph.fabrics for cell in part.cells]
    return {
        "cells": len(cells),
        "sources": sum(len(cell.sources) for cell in cells),
        "operations": sum(len(edge.choices) for cell in cells for edge in cell.edges),
    }
