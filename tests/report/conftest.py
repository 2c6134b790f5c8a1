from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return lambda **changes: write_run(tmp_path / "made", **changes)
