"""The table in README.md: every class of hostile files is there, and so is every test that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLASSES = range(1, 49)
TEST = re.compile(r"`([\w./-]+\.(?:py|rs))::(\w+)`")


def table() -> list[list[str]]:
    """The cells of the rows, without head and rule."""
    text = (Path(__file__).parent / "README.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_class_has_a_row_in_its_place() -> None:
    assert [row[0] for row in table()] == [str(number) for number in CLASSES]
    for row in table():
        assert len(row) == 4, f"row {row[0]} has {len(row)} cells"
        assert all(row), f"row {row[0]} has an empty cell"


@pytest.mark.parametrize("number", CLASSES)
def test_tests_of_a_class_exist(number: int) -> None:
    cells = next((row for row in table() if row[0] == str(number)), None)
    assert cells, f"row {number} is missing"
    named = cells[-1].split(", ")
    for name in named:
        found = TEST.fullmatch(name)
        assert found, f"row {number}: {name} is no test in a file"
        path, function = ROOT / found[1], found[2]
        assert path.is_file(), f"row {number}: there is no file {found[1]}"
        keyword = "def" if path.suffix == ".py" else "fn"
        assert f"{keyword} {function}(" in path.read_text(), f"row {number}: {found[1]} has no {function}"
