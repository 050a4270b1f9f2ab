"""The run folder: creating, opening, its state, its series, parent and child runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from posefabric.config import Config, config_from_tree, with_overrides
from posefabric.run import lineage
from posefabric.run.contents import RunFiles
from posefabric.run.environment import describe_environment
from posefabric.run.files import (
    is_temporary,
    json_bytes,
    remove_temporaries,
    write_atomic,
)
from posefabric.run.header import (
    Kind,
    State,
    check_kind,
    check_state,
    new_header,
    now,
    read_header,
    relative,
)
from posefabric.run.lineage import did_you_mean, run_paths, shortest
from posefabric.run.metrics import MetricsLog
from posefabric.run.resume import check_resumable
from posefabric.structures import PosefabricError

logger = logging.getLogger(__name__)


SKELETON_NAME = "skeleton.yaml"


class RunFolder(RunFiles):
    """One search, derivation or training on disk: a folder with these files.

    ``run.json`` (kind, state, parent, children, command), ``config.yaml`` (resolved),
    ``skeleton.yaml`` (a copy of the user's own, so that the run stands alone),
    ``environment.json``, ``metrics.jsonl`` (one JSON record a line), ``checkpoints/``,
    ``architecture.json``, ``weights.safetensors``, ``report.html``, ``model.onnx``,
    ``overlays/``, ``tensorboard/`` and ``children/NN-kind/`` (run folders themselves).
    Every whole file is written beside its place, synced and renamed, so that a reader or
    a crash sees the old file or the new one. One process writes a run at a time; in others
    ``writes`` is False.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Use :meth:`create` or :meth:`open`."""
        super().__init__(path, header["kind"])
        self.created: str = header["created"]
        self._config: Config | None = None
        self._metrics = MetricsLog(self.metrics_path, board=path / "tensorboard")

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r}, kind={self.kind!r})"

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        config: Config,
        kind: Kind,
        parent: RunFolder | None = None,
        exist_ok: bool = False,
    ) -> RunFolder:
        """Make a new run folder, or with ``exist_ok`` take up the one that is there.

        ``run.json`` is written last, so a folder that holds it is complete. A run taken up
        must be of the same kind and configuration (device, threads, data root, workers, cache
        and checkpoint interval may differ) and is set to running unless it is finished.

        Raises PosefabricError for a file, a folder with other content, an existing run
        without ``exist_ok``, a different configuration, and a place that cannot be written.
        """
        check_kind(kind)
        path = Path(path).resolve()
        try:
            if path.exists() and not path.is_dir():
                raise PosefabricError(f"{path}: is a file, not a folder; choose another --out")
            if (path / "run.json").exists():
                if exist_ok:
                    return cls._take_up(path, config, kind)
                raise PosefabricError(
                    f"{path}: already holds a run; choose another --out, or continue with --resume"
                )
            found = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        except OSError as error:
            raise PosefabricError(f"{path}: cannot be used ({error.strerror})") from error
        # A creation that was killed leaves environment.json first; nothing of it is missed.
        ours = (
            ("environment.json", "config.yaml", SKELETON_NAME)
            if "environment.json" in found
            else ()
        )
        foreign = sorted(name for name in found if name not in ours and not is_temporary(name))
        if foreign:
            raise PosefabricError(
                f"{path}: holds other files ({', '.join(foreign[:3])}...) and no run.json, so no "
                f"run to --resume; choose another --out"
            )
        header = new_header(path, kind=kind, parent=parent.path if parent else None)
        write_atomic(path / "environment.json", json_bytes(describe_environment()))
        write_atomic(path / "config.yaml", _yaml_bytes(config))
        if Path(config.data.skeleton).is_file():
            write_atomic(path / SKELETON_NAME, Path(config.data.skeleton).read_bytes())
        write_atomic(path / "run.json", json_bytes(header))
        if parent is not None and path.parent != parent.path / "children":
            kept = parent._header()
            kept["children"] = [*kept.get("children", []), relative(path, parent.path)]
            write_atomic(parent.path / "run.json", json_bytes(kept))
        return cls(path, header)

    @classmethod
    def _take_up(cls, path: Path, config: Config, kind: str) -> RunFolder:
        run = cls.open(path)
        if run.kind != kind:
            raise PosefabricError(
                f"{path}: holds a {run.kind} run, not a {kind} run; choose another --out"
            )
        config = run._with_own_skeleton(config)
        check_resumable(run.config, config, path=path)
        remove_temporaries(path)
        if config != run.config:
            run.write_bytes("config.yaml", _yaml_bytes(config))
            run._config = None
        if run.state != "finished":
            run.set_state("running")
        return run

    @classmethod
    def open(cls, path: Path | str, *, writes: bool = True) -> RunFolder:
        """Read an existing run folder; without ``writes`` it, and its kin, stay as they are.

        Raises PosefabricError that says what is wrong (no such folder, a file, no run.json,
        damaged, another format version, not readable) and which runs there are nearby.
        """
        shown, path = path, Path(path).resolve()
        try:
            if not path.exists():
                raise PosefabricError(f"{shown}: no such run folder{_nearby(path)}")
            if not path.is_dir():
                hint = (
                    f"; did you mean {path.parent}?" if (path.parent / "run.json").exists() else ""
                )
                raise PosefabricError(f"{shown}: is a file, expected a run folder{hint}")
            if not (path / "run.json").exists():
                raise PosefabricError(
                    f"{shown}: is not a run folder (it holds no run.json){_nearby(path)}"
                )
        except OSError as error:
            raise PosefabricError(
                f"{shown}: cannot be read ({error.strerror}); expected a run folder you may read"
            ) from error
        run = cls(path, read_header(path))
        run.writes = writes
        return run

    def _header(self) -> dict[str, Any]:
        return read_header(self.path)

    @property
    def config(self) -> Config:
        """The resolved configuration of config.yaml; PosefabricError when it is not valid."""
        if self._config is None:
            path = self.path / "config.yaml"
            try:
                tree = yaml.safe_load(self.read_bytes("config.yaml"))
            except yaml.YAMLError as error:
                raise PosefabricError(f"{path}: cannot be read as YAML: {error}") from error
            config = config_from_tree(tree or {}, origin=str(path))
            own = self.path / SKELETON_NAME
            if own.is_file():
                config.data.skeleton = str(own)
            self._config = config
        return self._config

    def overridden(self, overrides: Sequence[str]) -> RunFolder:
        """This run read with ``section.option=value`` overrides; its files stay as they are."""
        self._config = with_overrides(self.config, overrides)
        return self

    def _with_own_skeleton(self, config: Config) -> Config:
        """``config`` naming the run's copy when its own skeleton file says the same."""
        own, given = self.path / SKELETON_NAME, Path(config.data.skeleton)
        if own.is_file() and given.is_file() and own.read_bytes() == given.read_bytes():
            config = config.model_copy(deep=True)
            config.data.skeleton = str(own)
        return config

    @property
    def parent(self) -> RunFolder | None:
        """The run this one was made from; None when there is none or it is no longer there."""
        name = self._header()["parent"]
        if name is None:
            return None
        path = (self.path / name).resolve()
        if not (path / "run.json").exists():
            logger.warning("%s: its parent run %s is not there any more", self.path, path)
            return None
        return RunFolder.open(path, writes=self.writes)

    @property
    def state(self) -> State:
        """As on disk now. A killed process cannot say so: its run stays ``running``."""
        return self._header()["state"]

    @property
    def info(self) -> dict[str, Any]:
        """What :meth:`set_state` was told besides the state."""
        return self._header().get("info", {})

    def set_state(self, state: State, **info: Any) -> None:
        """Write the state; ``info`` (JSON values) is merged into what was said before."""
        check_state(state)
        if not self.writes:
            return
        header = self._header()
        header.update(state=state, updated=now(), info={**header.get("info", {}), **info})
        write_atomic(self.path / "run.json", json_bytes(header))
        if state != "running":
            self._metrics.close()

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl, and its numbers to TensorBoard if installed.

        ``record``: JSON values and scalars; ``step`` (int) and ``phase`` (str) are what
        :meth:`rewind` goes by. The line reaches the file before this returns, whole or not
        at all. Raises PosefabricError when the disk is full.
        """
        if self.writes:
            self._metrics.append(record)

    def metrics(self) -> list[dict[str, Any]]:
        """All records in order; a last line torn by a crash is left out."""
        return self._metrics.read()

    def rewind(self, step: int, phase: str | None = None) -> None:
        """Drop what was logged after ``step``, before going on from a checkpoint of that step.

        The file is in the order of the run, so it is cut at the first record beyond ``step``
        (of ``phase``, if given; phases follow one another, and those that came later go too).
        A loop that logs a step before it saves that step's checkpoint then has every record
        exactly once, as if it had never stopped.
        """
        if self.writes:
            self._metrics.rewind(step, phase)

    def new_child(self, kind: Kind, config: Config, out: Path | str | None = None) -> RunFolder:
        """A run made from this one, in ``children/NN-kind`` or, noted in run.json, at ``out``."""
        if out is not None:
            return RunFolder.create(out, config=config, kind=kind, parent=self)
        folder = self.path / "children"
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        taken = [int(name[:2]) for name in names if name[:2].isdigit()]
        name = f"{max(taken, default=0) + 1:02d}-{kind}"
        return RunFolder.create(folder / name, config=config, kind=kind, parent=self)

    def children(self) -> list[RunFolder]:
        """The runs made from this one, newest last; deleted and damaged ones are left out."""
        folder = self.path / "children"
        paths = [*sorted(folder.iterdir())] if folder.is_dir() else []
        paths += [(self.path / name).resolve() for name in self._header().get("children", [])]
        found = _open_all(dict.fromkeys(paths))
        for run in found:
            run.writes = self.writes
        return found

    def descendants(self) -> dict[str, RunFolder]:
        """Children, their children and so on, by name: ``01-derive``, ``01-derive/01-train``."""
        return lineage.descendants(self)

    def resolve(self, which: str = "auto") -> RunFolder:
        """The run whose network is meant; its ``describe()`` says which it is.

        ``auto``: the newest finished compact descendant (kind derive or train), else this run;
        ``compact``: the same, but there must be one; ``mixture``: this run or the ancestor that
        searched; otherwise the name of a descendant as in :meth:`descendants`.

        Raises PosefabricError that lists what there is.
        """
        return lineage.resolve(self, which)

    def describe(self) -> str:
        """One line for the user: what this run is, where, and its state."""
        noun = {"search": "mixture", "derive": "compact network", "train": "trained network"}
        return f"{noun[self.kind]} of {shortest(self.path)} ({self.kind}, {self.state})"


def find_runs(folder: Path | str, *, depth: int = 3) -> list[RunFolder]:
    """The runs in a folder (or the folder itself), oldest first, without their children.

    Looks ``depth`` levels down; hidden, unreadable and damaged folders are left out.
    """
    return _open_all(run_paths(Path(folder).resolve(), depth=depth))


def _open_all(paths: Iterable[Path]) -> list[RunFolder]:
    runs = []
    for path in paths:
        try:
            if (path / "run.json").is_file():
                runs.append(RunFolder.open(path))
        except (OSError, PosefabricError) as error:
            logger.warning("left out: %s", error)
    return sorted(runs, key=lambda run: (run.created, run.path.name))


def _nearby(path: Path) -> str:
    """For an error message: the likely run and some runs near a path that is none."""
    folder = path
    while not folder.is_dir():
        folder = folder.parent
    names = [shortest(run.path) for run in find_runs(folder)]
    if not names:
        return f"; there are no runs in {folder}"
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{did_you_mean(shortest(path), names)}; runs there: {listed}"


def _yaml_bytes(config: Config) -> bytes:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
