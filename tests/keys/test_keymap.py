"""Key maps: which keys, under which names, and what is refused before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import reweft
from reweft import KeyMap
from support import assert_hints, assert_says, raw, save

if TYPE_CHECKING:
    from pathlib import Path


def test_rules_apply_in_order_to_the_result_before() -> None:
    assert KeyMap([("^a", "b"), ("^b", "c")]).apply(["a.x", "b.x"[1:]]) == {"a.x": "c.x", ".x": ".x"}
    assert KeyMap([("^b", "c"), ("^a", "b")]).apply(["a.x"]) == {"a.x": "b.x"}


def test_every_match_in_a_key_is_replaced() -> None:
    assert KeyMap([("_", ".")]).apply(["a_b_c"]) == {"a_b_c": "a.b.c"}


def test_groups_by_number_and_name() -> None:
    keys = KeyMap([(r"^layer(\d+)_(?P<rest>.*)$", "layers.${1}.$rest")])
    assert keys.apply(["layer12_weight", "norm"]) == {"layer12_weight": "layers.12.weight", "norm": "norm"}


def test_dollar_sign_is_written_twice() -> None:
    assert KeyMap([("x", "$$1")]).apply(["x"]) == {"x": "$1"}


def test_keys_keep_their_order() -> None:
    assert list(KeyMap([("^z", "a")]).apply(["z", "m", "b"]).values()) == ["a", "m", "b"]


def test_collision_names_both_keys_and_the_name() -> None:
    with pytest.raises(reweft.KeyCollisionError) as error:
        KeyMap([(r"^(a|b)\.", "")]).apply(["a.x", "c", "b.x"])
    assert_says(error, "a.x", "b.x", '"x"')
    assert_hints(error)


def test_collision_with_a_key_that_no_rule_touches() -> None:
    with pytest.raises(reweft.KeyCollisionError):
        KeyMap([(r"^module\.", "")]).apply(["module.w", "w"])


@pytest.mark.parametrize("replacement", ["$1_x", "$2", "$name", "${}", "${1x}"])
def test_group_that_the_pattern_lacks_is_refused(replacement: str) -> None:
    with pytest.raises(reweft.UsageError) as error:
        KeyMap([(r"^(\w+)\.", replacement)])
    assert_hints(error)


def test_group_number_before_text_is_written_in_braces() -> None:
    assert KeyMap([(r"^(\w+)\.", "${1}_x.")]).apply(["a.w"]) == {"a.w": "a_x.w"}


@pytest.mark.parametrize("pattern", ["(", "(?=look)", r"(a)\1", "[z-a]", "a{99999999}"])
def test_pattern_that_does_not_compile_is_refused(pattern: str) -> None:
    with pytest.raises(reweft.UsageError):
        KeyMap([(pattern, "")])
    with pytest.raises(reweft.UsageError):
        KeyMap(select=[pattern])


def test_pattern_that_backtracks_elsewhere_is_linear_here() -> None:
    key = "a" * 5_000 + "!"
    assert KeyMap([("^(a+)+$", "")]).apply([key]) == {key: key}


def test_rule_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(reweft.UsageError, match="nothing"):
        KeyMap([("^w$", "")]).apply(["w"])


def test_selection_sees_keys_before_rules() -> None:
    keys = KeyMap([("^model", "net")], select=["^model", "bias$"])
    assert keys.apply(["model.w", "head.bias", "head.w"]) == {"model.w": "net.w", "head.bias": "head.bias"}
    assert KeyMap(select="^a").apply(["a", "b"]) == {"a": "a"}


def test_selection_that_matches_nothing_is_an_error_even_beside_one_that_does() -> None:
    with pytest.raises(reweft.NotFoundError) as error:
        KeyMap(select=["^a", "^nope"]).apply(["a"])
    assert_says(error, "^nope")


def test_key_map_prints_as_it_is_written() -> None:
    assert repr(KeyMap([("a", "b")], select=["c"])) == "KeyMap([('a', 'b')], select=['c'])"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weights = {"module.fc.weight": torch.randn(2), "module.fc.bias": torch.randn(3)}
    return save({"model_state_dict": weights, "optimizer": {"state": {0: torch.ones(1)}}}, tmp_path / "x.pt")


def test_opening_under_other_names(checkpoint: Path) -> None:
    keys = KeyMap([(r"^module\.", "")])
    opened = reweft.open(checkpoint, top_level_key="model_state_dict", keys=keys)
    assert list(opened) == ["fc.weight", "fc.bias"]
    wanted = torch.load(checkpoint)["model_state_dict"]["module.fc.bias"]
    assert bytes(opened["fc.bias"].read()) == raw(wanted)


def test_rekey_is_the_same_as_opening_with_a_key_map(checkpoint: Path) -> None:
    keys = KeyMap([(r"^module\.", "")], select=["weight$"])
    opened = reweft.open(checkpoint, top_level_key="model_state_dict")
    assert list(opened.rekey(keys)) == ["fc.weight"]
    assert list(opened) == ["module.fc.weight", "module.fc.bias"]


def test_rule_that_matches_no_key_is_noticed(checkpoint: Path) -> None:
    opened = reweft.open(checkpoint, keys=KeyMap([("^modul3", "")]))
    assert any("modul3" in notice for notice in opened.notices)


def test_collision_names_the_file(checkpoint: Path) -> None:
    with pytest.raises(reweft.KeyCollisionError) as error:
        reweft.open(checkpoint, keys=KeyMap([(r"\.(weight|bias)$", "")]))
    assert_says(error, checkpoint, "module.fc.weight", "module.fc.bias")


def test_selection_that_matches_nothing_names_the_file(checkpoint: Path) -> None:
    with pytest.raises(reweft.NotFoundError) as error:
        reweft.open(checkpoint, keys=KeyMap(select=["^encoder"]))
    assert_says(error, checkpoint, "^encoder")


def test_absent_top_level_key_lists_those_that_exist_and_suggests_the_nearest(checkpoint: Path) -> None:
    with pytest.raises(reweft.NotFoundError) as error:
        reweft.open(checkpoint, top_level_key="model_sate_dict")
    assert_says(error, checkpoint, "model_sate_dict", "model_state_dict, optimizer")
    assert_hints(error)
    assert "model_state_dict" in (error.value.hint or "")


def test_top_level_key_that_leads_to_no_tensor(tmp_path: Path) -> None:
    path = save({"w": torch.ones(1), "epoch": 3, "nothing": {}}, tmp_path / "x.pt")
    for key in ("epoch", "nothing"):
        with pytest.raises(reweft.NotFoundError) as error:
            reweft.open(path, top_level_key=key)
        assert_says(error, path, key)


def test_top_level_key_may_have_dots_of_its_own(tmp_path: Path) -> None:
    path = save({"a.b": {"c": {"w": torch.ones(1)}}, "a": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    assert reweft.open(path, top_level_key="a.b.c")["w"].shape == (1,)
    assert reweft.open(path, top_level_key="a")["w"].shape == (2,)
