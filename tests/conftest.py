"""What all tests share: the shared data folder, and one thread a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before torch is imported: sums, and so losses, depend in the last bit on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference values and real photographs that lies beside a checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (reference values and photographs), which is not here")
    return SHARED
