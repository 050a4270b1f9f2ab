"""The commands that make one run of a study by hand."""

from __future__ import annotations

import shlex

from posefabric.run import RunFolder
from posefabric.study.plan import PlannedRun


def commands_of(planned: PlannedRun, finished: RunFolder) -> list[str]:
    """What to type for the same run outside the study; folders of data are left to the reader.

    A fabric that is trained from the start has no command of its own: it is a study's.
    """
    options = [shown(override) for override in planned.overrides]
    out = f"runs/{planned.folder}"
    configured = [*([planned.config_name] if planned.config_name else []), *options]
    if planned.steps == "search":
        return [_line("search", *configured, "--out", out)]
    if planned.steps == "search+finetune":
        return [
            _line("search", *configured, "--out", out),
            _line("derive", out, "--finetune"),
        ]
    if planned.config.model.network == "fabric":
        return []
    if planned.reference is not None:
        configured.append(f"finetune.epochs={finished.config.finetune.epochs!r}")
    return [_line("train", *configured, "--out", out)]


def _line(*words: str) -> str:
    return "posefabric " + shlex.join(words)


def shown(override: str) -> str:
    """An override as a page has it: where the data lie is nobody else's."""
    return "data.root=DIR" if override.startswith("data.root=") else override
