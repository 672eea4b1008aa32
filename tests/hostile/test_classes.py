"""The table in README.md: every class of hostile files is there, and so is every test that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import assert_tests_exist, rows_of

CLASSES = range(1, 49)
TABLE = rows_of(Path(__file__).parent / "README.md")


def test_every_class_has_a_row_in_its_place() -> None:
    assert [row[0] for row in TABLE] == [str(number) for number in CLASSES]
    for row in TABLE:
        assert len(row) == 4, f"row {row[0]} has {len(row)} cells"
        assert all(row), f"row {row[0]} has an empty cell"


@pytest.mark.parametrize("number", CLASSES)
def test_tests_of_a_class_exist(number: int) -> None:
    cells = next((row for row in TABLE if row[0] == str(number)), None)
    assert cells, f"row {number} is missing"
    assert_tests_exist(cells[-1])
