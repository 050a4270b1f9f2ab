"""Run folders: one search, derivation or training on disk."""

from posefabric.run.files import remove_temporaries, write_atomic
from posefabric.run.folder import RunFolder, find_runs
from posefabric.run.header import FORMAT_VERSION, Kind, State

__all__ = [
    "FORMAT_VERSION",
    "Kind",
    "RunFolder",
    "State",
    "find_runs",
    "remove_temporaries",
    "write_atomic",
]
