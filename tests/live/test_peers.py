"""The table in README.md: every test that it names is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import assert_tests_exist, rows_of

TABLE = rows_of(Path(__file__).parent / "README.md")


def test_every_peer_has_rows() -> None:
    peers = {row[0] for row in TABLE}
    neuronx = {"neuronx trace", "neuronx replace_weights", "neuronx dynamic_batch"}
    assert peers == neuronx | {"TensorRT refit", "TensorRT engine cache", "TensorRT mutable module"}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[1])
def test_tests_of_a_row_exist(row: list[str]) -> None:
    assert len(row) == 4, row
    assert all(row), "an empty cell"
    assert_tests_exist(row[-1])
