"""What a training shows while it runs, and how it is asked to stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

_BAR_WIDTH = 20
_REFRESH_S = 0.5


class Progress:
    """One live line on a terminal; elsewhere a plain line about every ``interval_s`` seconds.

    Use as a context manager::

        with Progress() as progress:
            progress.start(total_steps, "search", step=resumed_step)
            progress.update(step, {"loss": loss, "images_per_s": speed})

    Values may be tensors: they are read (which makes a GPU wait) only when a line is due.
    Output that fails (a closed pipe, a full disk) is given up silently; training goes on.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        interval_s: float = 30.0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._interval_s = interval_s
        self._enabled = enabled
        self._clock = clock
        self._live: Live | None = None
        self._running = False
        self._total, self._step, self._label = 0, 0, ""
        self._values: dict[str, Any] = {}
        self._began = self._shown = clock()
        self._rate_from: tuple[float, int] | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()

    def start(self, total_steps: int, label: str, *, step: int = 0) -> None:
        """Begin a phase of ``total_steps`` that stands at ``step`` (more than 0 on a resume)."""
        self.finish()
        self._total, self._label = total_steps, label
        self._step, self._values = step, {}
        self._began = self._shown = self._clock()
        # Until the second step, the time left would be a guess from warm-up.
        self._rate_from = None
        self._running = self._enabled
        if not self._running:
            return
        if self._console.is_interactive:
            self._live = Live(console=self._console, auto_refresh=False)
            with contextlib.suppress(OSError, ValueError):
                self._live.start()
        self._show()

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """``step`` steps are done; ``values`` (numbers, 0-d tensors, texts) replace the last."""
        if not self._running:
            return
        self._step = step
        self._values = dict(values or self._values)
        now = self._clock()
        if self._rate_from is None:
            self._rate_from = (now, step)
        due = _REFRESH_S if self._live is not None else self._interval_s
        if now - self._shown >= due:
            self._shown = now
            self._show()

    def finish(self) -> None:
        """Show the last state and end the phase; called on leaving the context too."""
        if not self._running:
            return
        self._running = False
        self._show()
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()
            self._live = None

    def line(self) -> str:
        """The line as plain text: ``search  120/500  24%  loss 0.1234  left 1:02``."""
        done = self._step / self._total if self._total else 1.0
        pieces = [self._label]
        if self._live is not None:
            filled = min(round(done * _BAR_WIDTH), _BAR_WIDTH)
            pieces.append("#" * filled + "." * (_BAR_WIDTH - filled))
        pieces += [f"{self._step}/{self._total}", f"{math.floor(100 * done)}%"]
        # Time before the values: a narrow terminal cuts the end of the line.
        left = self._seconds_left()
        if self._step < self._total and self._running:
            pieces.append(f"left {_duration(left)}" if left is not None else "left ?")
        else:
            pieces.append(f"took {_duration(self._clock() - self._began)}")
        pieces += [f"{_readable(name)} {_number(value)}" for name, value in self._values.items()]
        return "  ".join(pieces)

    def _seconds_left(self) -> float | None:
        if self._rate_from is None or self._step <= self._rate_from[1]:
            return None
        since, first = self._rate_from
        return (self._clock() - since) / (self._step - first) * (self._total - self._step)

    def _show(self) -> None:
        # A lost terminal or a full disk under a redirected output must not end a long run.
        with contextlib.suppress(OSError, ValueError):
            if self._live is not None:
                text = Text(self.line(), no_wrap=True, overflow="ellipsis")
                self._live.update(text, refresh=True)
            else:
                # Not console.print: rich answers a closed pipe with SystemExit.
                self._console.file.write(self.line() + "\n")
                self._console.file.flush()


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag, so that a loop ends between two steps.

    ``requested`` is True after the first signal; a second Ctrl-C raises KeyboardInterrupt at
    once. The former handlers come back on leaving; an enclosing StopRequest is told as well.
    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self.signal_name: str | None = None
        self._former: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopRequest:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            # None stands for a handler set outside Python, which cannot be set from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._handle_in_worker(number)
            return
        again = self.requested
        self._request(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not again:
            # Not print: a handler may interrupt a print that holds the stream's lock.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

    def _request(self, number: int) -> None:
        self.requested = True
        self.signal_name = self.signal_name or signal.Signals(number).name
        outer = getattr(self._former.get(number), "__self__", None)
        if isinstance(outer, StopRequest):
            outer._request(number)

    def _handle_in_worker(self, number: int) -> None:
        """In a forked data worker: the main process answers Ctrl-C; SIGTERM is meant for it."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _readable(name: str) -> str:
    return name.replace("_per_", "/").replace("_", " ")


def _number(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
