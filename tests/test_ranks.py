"""The pool of ranks itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.ranks import RankPool


def crash(path: str, times: int) -> str:
    """Die in native code the first `times` times."""
    with open(path, "a") as file:
        file.write("x")
    if Path(path).stat().st_size <= times:
        os.abort()
    return "done"


def test_one_crash_of_a_session_is_forgiven_and_told(tmp_path):
    pool = RankPool()
    assert pool.run(1, crash, path=str(tmp_path / "first"), times=1) == ["done"]
    assert len(pool.crashes) == 1 and "status -6" in pool.crashes[0]
    assert "in crash" in pool.crashes[0]  # where Python was
    with pytest.raises(AssertionError, match="status -6"):
        pool.run(1, crash, path=str(tmp_path / "second"), times=1)
    pool.close()
