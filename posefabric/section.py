"""What the sections of an experiment's options share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


def checked_input_wh(value: tuple[int, int]) -> tuple[int, int]:
    """The size, if every level of a pyramid divides it."""
    if any(side < 32 or side % 32 for side in value):
        raise ValueError(f"both sides must be positive multiples of 32, got {value}")
    return value
