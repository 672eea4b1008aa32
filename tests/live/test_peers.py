"""The table in README.md: every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST = re.compile(r"`([\w./-]+\.py)::(\w+)`")
HEAD = 2


def table() -> list[list[str]]:
    """The cells of the rows, without head and rule."""
    text = (Path(__file__).parent / "README.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[HEAD:]]


def test_every_peer_has_rows() -> None:
    peers = {row[0] for row in table()}
    assert peers == {"neuronx trace", "neuronx replace_weights", "neuronx dynamic_batch", "TensorRT refit"}


@pytest.mark.parametrize("row", table(), ids=lambda row: row[1])
def test_tests_of_a_row_exist(row: list[str]) -> None:
    assert len(row) == 4, row
    assert all(row), "an empty cell"
    for name in row[-1].split(", "):
        found = TEST.fullmatch(name)
        assert found, f"{name} is no test in a file"
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text(), f"{found[1]} has no {found[2]}"
