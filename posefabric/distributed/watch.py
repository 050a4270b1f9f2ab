"""Signs of life: finds out which rank has died, and ends those that would wait for it."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

from posefabric.distributed.launch import Launch
from posefabric.structures import PosefabricError

BEAT_S = 0.5
FOUND_S = 4.0  # without a sign, once a rank is known to be missing
SILENT_S = 60.0  # without a sign, while all seems well
GRACE_S = 10.0  # for a rank to end by itself once another is gone


class RankLost(PosefabricError):
    """Another process of the run has ended; ``ranks`` are the numbers of those known."""

    def __init__(self, text: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.ranks = ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return RankLost, (str(self), self.ranks)


class Watch:
    """Each rank tells the meeting place that it lives, and why it ends.

    Args:
        store: a connection of its own to the meeting place.
        silent_s: how long a rank may give no sign before this process ends itself. A process
            that waits in a collective operation of a GPU cannot be told otherwise.
    """

    def __init__(self, store: Any, launch: Launch, *, silent_s: float = SILENT_S) -> None:
        self._store = store
        self._launch = launch
        self._silent_s = silent_s
        self._beats: dict[int, bytes] = {}
        self._seen = dict.fromkeys(range(launch.ranks), time.monotonic())
        self._cut_off = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Once every rank has joined."""
        place = f"{socket.gethostname()}, process {os.getpid()}"
        self._store.set(f"who/{self._launch.rank}", place)
        self._store.set(f"beat/{self._launch.rank}", "0")
        self._seen = dict.fromkeys(self._seen, time.monotonic())
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def end(self, text: str, *, lost: tuple[int, ...] = ()) -> None:
        """Say why this rank ends: "" for a good end, ``lost`` when others were lost first."""
        self._stop.set()
        try:
            value = json.dumps({"text": text, "lost": list(lost)})
            self._store.set(f"end/{self._launch.rank}", value)
        except Exception:  # the meeting place is gone, and so is everyone to tell
            return
        if text and self._launch.rank == 0 and not self._launch.hosted:
            self._outlast(lost)

    def _outlast(self, lost: tuple[int, ...]) -> None:
        """Hold the meeting place until the others have read there who is gone."""
        until, others = time.monotonic() + 2 * FOUND_S, set(self._seen) - {0, *lost}
        while others - set(self._ends() or others) and time.monotonic() < until:
            time.sleep(0.05)

    def told_by_first(self, text: str, wait_s: float = 2.0) -> bool:
        """Whether rank 0 ends with the same words; then one of them need not be printed."""
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            ends = self._ends()
            if ends is None:
                return False
            if 0 in ends:
                return ends[0]["text"] == text
            time.sleep(0.05)
        return False

    def lost(self, cause: object) -> RankLost:
        """What to raise after a collective operation has failed: names who is gone."""
        until = time.monotonic() + 2 * FOUND_S
        gone: dict[int, str] = {}
        while not gone and time.monotonic() < until:
            gone = self._gone(FOUND_S)
            time.sleep(0.0 if gone else 0.1)
        return self._error(gone, cause)

    def _error(self, gone: dict[int, str], cause: object) -> RankLost:
        names = "; ".join(f"rank {rank} {text}" for rank, text in sorted(gone.items()))
        names = names or f"the connection to another rank broke ({cause})"
        return RankLost(
            f"rank {self._launch.rank} of {self._launch.ranks} stops: {names}; the last "
            f"checkpoint is intact, and the same command with --resume goes on from there, also "
            f"with another number of processes",
            tuple(sorted(gone)),
        )

    def _ends(self) -> dict[int, dict[str, Any]] | None:
        """What ended ranks said; None when the meeting place is gone."""
        found = {}
        if self._cut_off:
            return None  # a lost connection does not come back
        try:
            for rank in range(self._launch.ranks):
                if self._store.check([f"end/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"end/{rank}"))
        except Exception:
            self._cut_off = True
            return None
        return found

    def _gone(self, silent_s: float) -> dict[int, str]:
        """Rank to what happened to it, of those that ended badly or fell silent."""
        own, now = self._launch.rank, time.monotonic()
        ends = self._ends()
        if ends is None:
            # Whoever holds the meeting place took it along.
            if own == 0 or self._launch.hosted:
                return {}
            return {0: "has ended without a word, and the meeting place with it"}
        bad = {r: e for r, e in ends.items() if r != own and e["text"] and not e["lost"]}
        if bad:
            return {rank: f"({self._who(rank)}) ended: {e['text']}" for rank, e in bad.items()}
        silent = {
            rank: now - seen
            for rank, seen in self._seen.items()
            if rank != own and rank not in ends and now - seen > silent_s
        }
        if not silent:
            return {}
        longest = max(silent.values())
        return {
            rank: f"({self._who(rank)}) has ended without a word, or hangs: no sign of life for "
            f"{seconds:.0f} s"
            for rank, seconds in silent.items()
            if seconds > longest - 4 * BEAT_S
        }

    def _who(self, rank: int) -> str:
        try:
            return self._store.get(f"who/{rank}").decode()
        except Exception:
            return "place unknown"

    def _run(self) -> None:
        count, gone_since = 0, None
        while not self._stop.wait(BEAT_S):
            count += 1
            if not self._cut_off:
                try:
                    self._store.set(f"beat/{self._launch.rank}", str(count))
                    self._look()
                except Exception:
                    self._cut_off = True
            gone = self._gone(self._silent_s)
            if not gone:
                gone_since = None
                continue
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > GRACE_S and not self._stop.is_set():
                # The main thread waits where nothing can reach it.
                error = self._error(gone, "")
                self.end(str(error), lost=error.ranks)
                print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(1)

    def _look(self) -> None:
        others = [rank for rank in self._seen if rank != self._launch.rank]
        beats = self._store.multi_get([f"beat/{rank}" for rank in others])
        for rank, beat in zip(others, beats, strict=True):
            if self._beats.get(rank) != beat:
                self._beats[rank] = beat
                self._seen[rank] = time.monotonic()
