"""A budget as it is written: macs=0.3G, params=2M, latency=8ms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
Measure = Literal["macs", "params", "latency"]


@dataclass(frozen=True)
class Budget:
    """At most ``limit`` multiply-adds a picture, parameters, or milliseconds a picture, of the
    whole compact network.
    """

    measure: Measure
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``macs=0.3G``, ``params=2M`` or ``latency=8ms``; ValueError says what was expected."""
        number = r"(\d+(?:\.\d+)?)"
        counted = re.fullmatch(rf"(macs|params)={number}([KMG]?)", text.strip())
        timed = re.fullmatch(rf"latency={number}ms", text.strip())
        if counted is not None and float(counted[2]):
            measure: Measure = "macs" if counted[1] == "macs" else "params"
            return cls(measure, float(counted[2]) * UNITS[counted[3]])
        if timed is not None and float(timed[1]):
            return cls("latency", float(timed[1]))
        raise ValueError(
            f"expected macs=NUMBER or params=NUMBER with K, M or G, such as macs=0.3G, or "
            f"latency=NUMBERms, such as latency=8ms; got {text!r}"
        )

    def of(self, macs: float, params: float, ms: float = 0.0) -> float:
        """The number that the limit is on."""
        return {"macs": macs, "params": params, "latency": ms}[self.measure]

    def __str__(self) -> str:
        if self.measure == "latency":
            return f"latency={self.limit:g}ms"
        for unit in ("G", "M", "K"):
            if self.limit >= UNITS[unit]:
                return f"{self.measure}={self.limit / UNITS[unit]:g}{unit}"
        return f"{self.measure}={self.limit:g}"
