"""A budget as it is written: macs=0.3G, params=2M."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Budget:
    """At most ``limit`` multiply-adds a picture, or parameters, of the whole compact network."""

    measure: Literal["macs", "params"]
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``macs=0.3G`` or ``params=2M``; raises ValueError that says what was expected."""
        match = re.fullmatch(r"(macs|params)=(\d+(?:\.\d+)?)([KMG]?)", text.strip())
        if match is None or float(match[2]) == 0:
            raise ValueError(
                f"expected macs=NUMBER or params=NUMBER with K, M or G, such as macs=0.3G; "
                f"got {text!r}"
            )
        measure: Literal["macs", "params"] = "macs" if match[1] == "macs" else "params"
        return cls(measure, float(match[2]) * UNITS[match[3]])

    def of(self, macs: float, params: float) -> float:
        """The number that the limit is on."""
        return macs if self.measure == "macs" else params

    def __str__(self) -> str:
        for unit in ("G", "M", "K"):
            if self.limit >= UNITS[unit]:
                return f"{self.measure}={self.limit / UNITS[unit]:g}{unit}"
        return f"{self.measure}={self.limit:g}"
