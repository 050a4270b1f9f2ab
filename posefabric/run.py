"""The run folder: what is in it, reading, atomic writing, parent and child runs."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import yaml

from posefabric import __version__
from posefabric.config import Config, config_from_tree
from posefabric.structures import PosefabricError

FORMAT_VERSION = 1

Kind = Literal["search", "derive", "train"]
State = Literal["running", "stopped", "failed", "finished"]

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
# Options that may differ on a resume: they say where and how fast, not what is computed.
_MACHINE_OPTIONS = {"device", "threads", "data.root", "data.workers", "data.cache"}
_MACHINE_SUFFIX = ".checkpoint_every"

logger = logging.getLogger(__name__)


class RunFolder:
    """One search, derivation or training on disk: a folder with these files.

    ``run.json`` (kind, state, parent, children, command), ``config.yaml`` (resolved),
    ``environment.json``, ``metrics.jsonl`` (one JSON record a line), ``checkpoints/``,
    ``architecture.json``, ``weights.safetensors``, ``report.html``, ``model.onnx``,
    ``overlays/``, ``tensorboard/`` and ``children/NN-kind/`` (run folders themselves).
    Every whole file is written beside its place, synced and renamed, so that a reader or
    a crash sees the old file or the new one. One process writes a run at a time.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Use :meth:`create` or :meth:`open`."""
        self.path = path
        self.kind: Kind = header["kind"]
        self.created: str = header["created"]
        self._config: Config | None = None
        self._board = _Board(path / "tensorboard")

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
        if kind not in get_args(Kind):
            raise PosefabricError(f"kind {kind!r}: expected one of {', '.join(get_args(Kind))}")
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
        ours = ("environment.json", "config.yaml") if "environment.json" in found else ()
        foreign = sorted(name for name in found if name not in ours and not _is_temp(name))
        if foreign:
            raise PosefabricError(
                f"{path}: holds other files ({', '.join(foreign[:3])}...) and no run.json, so no "
                f"run to --resume; choose another --out"
            )
        header = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "created": _now(),
            "parent": _relative(parent.path, path) if parent else None,
            "posefabric": __version__,
            "command": shlex.join(sys.argv),
            "state": "running",
            "info": {},
            "children": [],
        }
        write_atomic(path / "environment.json", _json_bytes(_environment()))
        write_atomic(path / "config.yaml", _yaml_bytes(config))
        write_atomic(path / "run.json", _json_bytes(header))
        if parent is not None and path.parent != parent.path / "children":
            kept = parent._header()
            kept["children"] = [*kept.get("children", []), _relative(path, parent.path)]
            write_atomic(parent.path / "run.json", _json_bytes(kept))
        return cls(path, header)

    @classmethod
    def _take_up(cls, path: Path, config: Config, kind: str) -> RunFolder:
        run = cls.open(path)
        if run.kind != kind:
            raise PosefabricError(
                f"{path}: holds a {run.kind} run, not a {kind} run; choose another --out"
            )
        before = _flatten(run.config.model_dump(mode="json"))
        after = _flatten(config.model_dump(mode="json"))
        differing = [
            f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
            and key not in _MACHINE_OPTIONS
            and not key.endswith(_MACHINE_SUFFIX)
        ]
        if differing:
            raise PosefabricError(
                f"{path}: cannot be continued with another configuration: "
                f"{'; '.join(differing[:5])}; use the old values, or choose another --out"
            )
        remove_temporaries(path)
        if before != after:
            run.write_bytes("config.yaml", _yaml_bytes(config))
            run._config = None
        if run.state != "finished":
            run.set_state("running")
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Read an existing run folder.

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
        return cls(path, _read_header(path))

    def _header(self) -> dict[str, Any]:
        return _read_header(self.path)

    @property
    def config(self) -> Config:
        """The resolved configuration of config.yaml; PosefabricError when it is not valid."""
        if self._config is None:
            path = self.path / "config.yaml"
            try:
                tree = yaml.safe_load(self.read_bytes("config.yaml"))
            except yaml.YAMLError as error:
                raise PosefabricError(f"{path}: cannot be read as YAML: {error}") from error
            self._config = config_from_tree(tree or {}, origin=str(path))
        return self._config

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
        return RunFolder.open(path)

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
        if state not in get_args(State):
            raise PosefabricError(f"state {state!r}: expected one of {', '.join(get_args(State))}")
        header = self._header()
        header.update(state=state, updated=_now(), info={**header.get("info", {}), **info})
        write_atomic(self.path / "run.json", _json_bytes(header))
        if state != "running":
            self._board.close()

    # Well-known files; none needs to exist.
    @property
    def architecture_path(self) -> Path:
        return self.path / "architecture.json"

    @property
    def weights_path(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def onnx_path(self) -> Path:
        return self.path / "model.onnx"

    @property
    def overlays_dir(self) -> Path:
        return self.path / "overlays"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file of the run atomically; PosefabricError when the disk is full."""
        write_atomic(self.path / name, data)
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """``value``: JSON values, numpy and torch scalars and arrays."""
        return self.write_bytes(name, _json_bytes(value))

    def read_bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise PosefabricError(
                f"{self.path / name}: cannot be read ({error.strerror}); expected it in this "
                f"{self.kind} run, whose state is {self.state}"
            ) from error

    def read_json(self, name: str) -> Any:
        """PosefabricError when the file is missing or not JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise PosefabricError(f"{self.path / name}: is not valid JSON ({error})") from error

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl, and its numbers to TensorBoard if installed.

        ``record``: JSON values and scalars; ``step`` (int) and ``phase`` (str) are what
        :meth:`rewind` goes by. The line reaches the file before this returns, whole or not
        at all. Raises PosefabricError when the disk is full.
        """
        line = json.dumps(record, default=_plain).encode() + b"\n"
        try:
            with self.metrics_path.open("ab+", buffering=0) as opened:
                file = cast(BinaryIO, opened)
                end = _cut_torn_line(file)
                try:
                    write_all(file.fileno(), line)
                except BaseException:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise write_error(self.metrics_path, error, len(line)) from error
        self._board.add(json.loads(line))

    def metrics(self) -> list[dict[str, Any]]:
        """All records in order; a last line torn by a crash is left out."""
        return [record for record, _ in self._records()]

    def rewind(self, step: int, phase: str | None = None) -> None:
        """Drop what was logged after ``step``, before going on from a checkpoint of that step.

        The file is in the order of the run, so it is cut at the first record beyond ``step``
        (of ``phase``, if given; phases follow one another, and those that came later go too).
        A loop that logs a step before it saves that step's checkpoint then has every record
        exactly once, as if it had never stopped.
        """
        end, seen = 0, False
        for record, after in self._records():
            other = record.get("phase", phase) != phase if phase is not None else False
            if other and seen:
                break
            if not other and record.get("step", step) > step:
                break
            seen = seen or (phase is not None and record.get("phase") == phase)
            end = after
        self._board.rewind(step)
        if self.metrics_path.exists() and end < self.metrics_path.stat().st_size:
            write_atomic(self.metrics_path, self.read_bytes("metrics.jsonl")[:end])

    def _records(self) -> list[tuple[dict[str, Any], int]]:
        """Every record and the offset in bytes where its line ends."""
        if not self.metrics_path.exists():
            return []
        records, end = [], 0
        # What follows the last line end was being written when the process died.
        lines = self.read_bytes("metrics.jsonl").split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            end += len(line) + 1
            try:
                records.append((dict(json.loads(line)), end))
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    break
                raise PosefabricError(
                    f"{self.metrics_path}: line {number}: expected a JSON record, got "
                    f"{line[:60]!r}; delete that line to go on"
                ) from error
        return records

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
        return _open_all(dict.fromkeys(paths))

    def descendants(self) -> dict[str, RunFolder]:
        """Children, their children and so on, by name: ``01-derive``, ``01-derive/01-train``."""
        return self._descend({self.path})

    def _descend(self, visited: set[Path]) -> dict[str, RunFolder]:
        found = {}
        for child in self.children():
            if child.path in visited:
                continue
            visited.add(child.path)
            found[child.path.name] = child
            for name, run in child._descend(visited).items():
                found[f"{child.path.name}/{name}"] = run
        return found

    def resolve(self, which: str = "auto") -> RunFolder:
        """The run whose network is meant; its ``describe()`` says which it is.

        ``auto``: the newest finished compact descendant (kind derive or train), else this run;
        ``compact``: the same, but there must be one; ``mixture``: this run or the ancestor that
        searched; otherwise the name of a descendant as in :meth:`descendants`.

        Raises PosefabricError that lists what there is.
        """
        descendants = self.descendants()
        if which == "mixture":
            run: RunFolder | None = self
            while run is not None and run.kind != "search":
                run = run.parent
            if run is None:
                raise PosefabricError(
                    f"{self.path}: is a {self.kind} run without a search above it"
                )
            return run
        if which in ("auto", "compact"):
            compact = [
                run
                for run in descendants.values()
                if run.kind in ("derive", "train") and run.state == "finished"
            ]
            if compact:
                return max(compact, key=lambda run: run.created)
            if which == "compact" and self.kind == "search":
                raise PosefabricError(
                    f"{self.path}: has no finished compact network; make one with "
                    f"`posefabric derive {self.path}`, or ask for the mixture"
                )
            return self
        if which in descendants:
            return descendants[which]
        nested = [name for name in descendants if name.endswith(f"/{which}")]
        if len(nested) == 1:
            return descendants[nested[0]]
        raise PosefabricError(
            f"{self.path}: {'more than one' if nested else 'no'} child run is called {which}"
            f"{did_you_mean(which, descendants)}; there are: "
            f"{', '.join(['auto', 'mixture', 'compact', *descendants])}"
        )

    def describe(self) -> str:
        """One line for the user: what this run is, where, and its state."""
        noun = {"search": "mixture", "derive": "compact network", "train": "trained network"}
        return f"{noun[self.kind]} of {_short(self.path)} ({self.kind}, {self.state})"


def find_runs(folder: Path | str, *, depth: int = 3) -> list[RunFolder]:
    """The runs in a folder (or the folder itself), oldest first, without their children.

    Looks ``depth`` levels down; hidden, unreadable and damaged folders are left out.
    """
    found: list[Path] = []
    level = [Path(folder).resolve()]
    for _ in range(depth + 1):
        below: list[Path] = []
        for place in level:
            with contextlib.suppress(OSError):
                if (place / "run.json").is_file():
                    found.append(place)
                    continue
                # No scan of a whole disk for a hint in an error message.
                entries = sorted(place.iterdir())[:1000]
                below += [e for e in entries if not e.name.startswith(".") and e.is_dir()]
        level = below[:1000]
    return _open_all(found)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file: temporary file in the same folder, fsync, rename.

    Raises PosefabricError when the disk is full or the place not writable; then the old file
    is as it was and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            write_all(file.fileno(), data)
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error, len(data)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """A system write may take only a part; go on until all is written or it fails."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(descriptor, view) :]


def write_error(path: Path, error: OSError, needed: int) -> PosefabricError:
    """What to tell the user about a failed write of ``needed`` bytes."""
    if error.errno in _FULL:
        return PosefabricError(
            f"{path}: the disk is full (needed {needed} bytes: {error.strerror}); free space and "
            f"run again with --resume; the last checkpoint is intact"
        )
    return PosefabricError(
        f"{path}: cannot be written ({error.strerror}); expected a place you may write to; "
        f"choose another --out"
    )


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed writer left in a folder; only for the process that writes there."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if _is_temp(entry.name):
            entry.unlink(missing_ok=True)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


class _Board:
    """TensorBoard beside the metrics: one event folder a phase, opened when first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] | None = {}
        self._purge_step: int | None = None

    def add(self, record: dict[str, Any]) -> None:
        step = record.get("step")
        if self._writers is None or not isinstance(step, int):
            return
        phase = str(record.get("phase", ""))
        # A lost mirror must never end a run: the numbers are in metrics.jsonl already.
        try:
            if phase not in self._writers:
                from torch.utils.tensorboard import SummaryWriter

                self._writers[phase] = SummaryWriter(
                    log_dir=str(self._folder / phase), purge_step=self._purge_step
                )
            for key, value in record.items():
                if key != "step" and type(value) in (int, float):
                    self._writers[phase].add_scalar(key, value, step)
        except ImportError:
            self._writers = None
            logger.info("tensorboard is not installed (extra viz): only metrics.jsonl is written")
        except Exception as error:
            self._writers = None
            logger.warning("%s: TensorBoard is left out from here on: %s", self._folder, error)

    def rewind(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        writers, self._writers = self._writers or {}, None if self._writers is None else {}
        for writer in writers.values():
            with contextlib.suppress(Exception):
                writer.close()


def _read_header(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    restore = "restore it from a copy, or start again with another --out"
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PosefabricError(
            f"{file}: cannot be read ({error.strerror}); expected a file you may read"
        ) from error
    except ValueError as error:
        raise PosefabricError(f"{file}: damaged, expected JSON ({error}); {restore}") from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise PosefabricError(
            f"{file}: format version {version}, this posefabric {__version__} reads "
            f"{FORMAT_VERSION}; use posefabric {header.get('posefabric', 'of that version')}"
        )
    if (
        version is None
        or header.get("kind") not in get_args(Kind)
        or header.get("state") not in get_args(State)
        or not isinstance(header.get("created"), str)
        or not isinstance(header.get("parent"), str | None)
    ):
        raise PosefabricError(
            f"{file}: damaged, expected format_version, kind, state, created and parent; {restore}"
        )
    return header


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
    names = [_short(run.path) for run in find_runs(folder)]
    if not names:
        return f"; there are no runs in {folder}"
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{did_you_mean(_short(path), names)}; runs there: {listed}"


def _cut_torn_line(file: BinaryIO) -> int:
    """Drop what a killed writer left after the last line end; the size of the file then."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        size = file.read().rfind(b"\n") + 1
        file.truncate(size)
    return size


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _environment() -> dict[str, Any]:
    """What a result depends on besides the configuration, and the hardware it names."""
    packages = {}
    for name in ("torch", "torchvision", "timm", "numpy", "opencv-python-headless"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    cpu, memory = platform.processor(), None
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "posefabric": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of posefabric's own checkout; None when it is installed from elsewhere."""
    package = Path(__file__).resolve().parent
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    top, _, commit = answer.stdout.strip().partition("\n")
    return commit if Path(top).resolve() == package.parent else None


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    """numpy and torch values as JSON, without importing either."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, default=_plain).encode() + b"\n"


def _yaml_bytes(config: Config) -> bytes:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()


def _short(path: Path) -> str:
    """Relative to the working folder where that is shorter to read."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


def _is_temp(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
