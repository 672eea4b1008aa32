"""Operations of key maps: what torch computes, under the names and in the order that the rules say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reweft
from reweft import KeyMap
from support import assert_hints, assert_says, raw, save

if TYPE_CHECKING:
    from pathlib import Path


def attention() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "attn.in_proj_weight": torch.randn(12, 4),
        "attn.in_proj_bias": torch.arange(12.0),
        "conv.weight": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "fc.weight": torch.randn(3, 4).t(),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(attention(), tmp_path / "x.pt")


def opened(path: Path, *rules: dict[str, Any], mmap: bool = False) -> dict[str, bytes]:
    checkpoint = reweft.open(path, keys=KeyMap(rules), mmap=mmap)
    return {key: bytes(info.read()) for key, info in checkpoint.items()}


@pytest.mark.parametrize("mmap", [False, True])
def test_five_lines_of_toml_split_a_packed_projection(path: Path, *, mmap: bool) -> None:
    keys = KeyMap.from_toml("""
        select = '^attn'
        [[rules]]
        match = '^(.*)\\.in_proj_(weight|bias)$'
        split = ['$1.q.$2', '$1.k.$2', '$1.v.$2']
    """)
    checkpoint = reweft.open(path, keys=keys, mmap=mmap)
    weights = attention()
    wanted = {
        f"attn.{name}.{kind}": part
        for kind in ("weight", "bias")
        for name, part in zip("qkv", weights[f"attn.in_proj_{kind}"].chunk(3), strict=True)
    }
    assert list(checkpoint) == list(wanted)
    for key, tensor in wanted.items():
        assert checkpoint[key].shape == tuple(tensor.shape)
        assert bytes(checkpoint[key].read()) == raw(tensor), key
    # Cutting moves no byte: all parts are views of the one storage.
    assert len({checkpoint[f"attn.{name}.weight"].storage for name in "qkv"}) == 1


def test_joining_gives_back_what_was_cut(path: Path) -> None:
    cut = {"match": r"^attn\.in_proj_weight$", "split": ["q", "k", "v"]}
    join = {"concat": ["^q$", "^k$", "^v$"], "into": "attn.in_proj_weight"}
    found = opened(path, cut, join)
    assert list(found) == list(attention())
    assert found["attn.in_proj_weight"] == raw(attention()["attn.in_proj_weight"])


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_join_along_each_dimension_as_torch_does(tmp_path: Path, dim: int) -> None:
    parts = [torch.randn(2, 3).t().contiguous().t(), torch.randn(2, 3), torch.randn(3, 2).t()]
    path = save({f"p{number}": part for number, part in enumerate(parts)}, tmp_path / "x.pt")
    found = opened(path, {"concat": ["^p1$", "^p0$", "^p2$"], "into": "all", "dim": dim})
    assert found == {"all": raw(torch.cat([parts[1], parts[0], parts[2]], dim))}


def test_lstm_gates_are_reordered_by_a_split_and_a_join(tmp_path: Path) -> None:
    weight = torch.randn(8, 3)
    path = save({"lstm.weight_ih_l0": weight}, tmp_path / "x.pt")
    i, f, g, o = weight.chunk(4)
    found = opened(
        path,
        {"match": "^lstm.weight_ih_l0$", "split": ["i", "f", "g", "o"]},
        {"concat": ["^i$", "^f$", "^o$", "^g$"], "into": "w"},
    )
    assert found == {"w": raw(torch.cat([i, f, o, g]))}


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ({"permute": [2, 3, 1, 0]}, lambda t: t.permute(2, 3, 1, 0)),
        ({"permute": [-1, 0, 2, 1]}, lambda t: t.permute(-1, 0, 2, 1)),
        ({"transpose": [0, -1]}, lambda t: t.transpose(0, -1)),
        ({"reshape": [6, -1]}, lambda t: t.reshape(6, -1)),
        ({"cast": "float16"}, lambda t: t.half()),
        ({"split": ["a", "b"], "dim": 1, "sizes": [1, 2]}, lambda t: t.split([1, 2], 1)),
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_operation_is_torchs(path: Path, rule: dict[str, Any], wanted: Any, *, mmap: bool) -> None:
    found = opened(path, {"match": "^conv.weight$", **rule}, mmap=mmap)
    tensor = wanted(attention()["conv.weight"])
    parts = {"conv.weight": tensor} if isinstance(tensor, torch.Tensor) else dict(zip("ab", tensor, strict=True))
    for name, part in parts.items():
        assert found[name] == raw(part)


def test_linear_weights_as_other_frameworks_lay_them_out(path: Path) -> None:
    checkpoint = reweft.open(path, keys=KeyMap([{"match": r"^fc\.weight$", "permute": [1, 0]}]))
    assert checkpoint["fc.weight"].shape == (3, 4)
    assert (checkpoint["fc.weight"].numpy() == attention()["fc.weight"].t().numpy()).all()


@given(st.data())
def test_chains_of_operations_are_torchs(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensor = torch.randn(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(tensor.dim()))))
    path = save({"w": tensor}, tmp_path_factory.mktemp("chain") / "x.pt")
    rules: list[dict[str, Any]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["permute", "reshape", "cast", "split"]))
        rule: dict[str, Any] = {"match": "^w$"}
        if kind == "permute":
            rule["permute"] = list(data.draw(st.permutations(range(tensor.dim()))))
            tensor = tensor.permute(rule["permute"])
        elif kind == "reshape":
            rule["reshape"] = data.draw(st.sampled_from([[-1], [tensor.shape[0], -1], [-1, tensor.shape[-1]]]))
            tensor = tensor.reshape(rule["reshape"])
        elif kind == "cast":
            rule["cast"] = data.draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"]))
            tensor = tensor.to(getattr(torch, rule["cast"]))
        else:
            dim = data.draw(st.integers(0, tensor.dim() - 1))
            sizes = [tensor.shape[dim] - 1, 1] if tensor.shape[dim] > 1 else [1]
            rule |= {"split": ["other", "w"][-len(sizes) :], "dim": dim, "sizes": sizes}
            rules += [rule, {"match": "^nothing$", "cast": "float32"}]
            tensor = torch.split(tensor, sizes, dim)[-1]
            rules.append({"drop": "^other$"})
            continue
        rules.append(rule)
    found = reweft.open(path, keys=KeyMap(rules))
    assert found["w"].shape == tuple(tensor.shape)
    assert found["w"].dtype == str(tensor.dtype).removeprefix("torch.")
    assert bytes(found["w"].read()) == raw(tensor)


def test_tied_tensors_stay_tied_through_the_same_operation(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    path = save({"a": tied, "b": tied}, tmp_path / "x.pt")
    checkpoint = reweft.open(path, keys=KeyMap([{"match": "", "cast": "bfloat16"}]))
    assert checkpoint["a"].storage == checkpoint["b"].storage
    assert reweft.open(path).cast("float16")["a"].storage == reweft.open(path).cast("float16")["b"].storage


def test_cast_of_a_checkpoint_leaves_integers_and_says_so(path: Path) -> None:
    checkpoint = reweft.open(path).cast("bfloat16")
    assert checkpoint["steps"].dtype == "int64"
    assert any("steps (int64)" in notice for notice in checkpoint.notices)
    assert bytes(checkpoint["conv.weight"].read()) == raw(attention()["conv.weight"].bfloat16())
    with pytest.raises(reweft.UsageError):
        reweft.open(path).cast("int8")


def test_conversion_to_another_dtype(path: Path, tmp_path: Path) -> None:
    report = reweft.convert(path, tmp_path / "x.safetensors", dtype="float16")
    written = reweft.open(tmp_path / "x.safetensors")
    for key, tensor in attention().items():
        assert bytes(written[key].read()) == raw(tensor.half() if tensor.is_floating_point() else tensor)
    assert any("steps (int64)" in notice for notice in report.notices)
    with pytest.raises(reweft.UsageError):
        reweft.convert(path, tmp_path / "y.safetensors", dtype="int8")
    assert not (tmp_path / "y.safetensors").exists()


def test_operations_reach_the_converted_file(path: Path, tmp_path: Path) -> None:
    keys = KeyMap([{"match": "^attn.in_proj_weight$", "split": ["q", "k", "v"]}, {"match": "^q$", "transpose": [0, 1]}])
    reweft.convert(path, tmp_path / "x.safetensors", keys=keys, shared="duplicate")
    written = reweft.open(tmp_path / "x.safetensors")
    q, _, v = attention()["attn.in_proj_weight"].chunk(3)
    assert bytes(written["q"].read()) == raw(q.t())
    assert bytes(written["v"].read()) == raw(v)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"match": "conv", "permute": [0, 1]}, ["conv.weight", "each dimension once"]),
        ({"match": "conv", "permute": [0, 1, 2, 4]}, ["conv.weight", "no dimension 4"]),
        ({"match": "conv", "reshape": [7, -1]}, ["conv.weight", "other elements"]),
        ({"match": "conv", "split": ["a", "b"]}, []),
        ({"match": "conv", "split": ["a", "b", "c"]}, ["does not split so"]),
        ({"match": "conv", "split": ["a"], "sizes": [9]}, ["smaller"]),
        ({"match": "steps", "cast": "float16"}, ["no cast from int64 to float16"]),
        ({"concat": ["^conv.weight$", "^fc.weight$"], "into": "x"}, ["do not fit each other"]),
        ({"concat": ["^conv.weight$", "^absent$"], "into": "x"}, ["a part is missing", "absent"]),
        ({"concat": ["weight$", "^fc.weight$"], "into": "x"}, ["both the part"]),
        ({"concat": ["^fc.weight$", "^fc.(weight)$"], "into": "conv.weight"}, ["conv.weight"]),
    ],
)
def test_operation_that_does_not_fit_is_refused_by_name(path: Path, rule: dict[str, Any], says: list[str]) -> None:
    if not says:
        reweft.open(path, keys=KeyMap([rule]))
        return
    with pytest.raises(reweft.ReweftError) as error:
        reweft.open(path, keys=KeyMap([rule]))
    assert_says(error, path, *says)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"rename": "a"},
        {"rename": "a", "to": "b", "drop": "c"},
        {"match": "a"},
        {"match": "a", "cast": "float16", "permute": [0]},
        {"match": "a", "cast": "no dtype"},
        {"match": "a", "split": []},
        {"match": "a", "split": ["x", "y"], "sizes": [1]},
        {"match": "(", "permute": [0]},
        {"match": "a", "split": ["$1"]},
        {"concat": ["a"], "into": "b"},
        {"concat": ["a", "b"]},
        {"renumber": "no group"},
        {"renumber": False},
        {"unknown": 1},
        {"strip_prefix": 3},
    ],
)
def test_rule_that_is_none_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(reweft.UsageError):
        KeyMap([rule])
    with pytest.raises(reweft.UsageError):
        KeyMap.from_toml("[[rules]]\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in rule.items()))


def test_literal_prefixes() -> None:
    keys = KeyMap([{"strip_prefix": "a."}, {"add_prefix": "net."}])
    assert keys.apply(["a.w", "aXw"]) == {"a.w": "net.w", "aXw": "net.aXw"}


def test_drop_and_select_by_whole_key() -> None:
    keys = ["a", "a.b", "c"]
    assert KeyMap(drop_keys=["a"]).apply(keys) == {"a.b": "a.b", "c": "c"}
    assert KeyMap(select_keys=["a"], select=["^c"]).apply(keys) == {"a": "a", "c": "c"}
    assert KeyMap(drop=["^a"]).report(keys).dropped == ("a", "a.b")
    for wrong in (KeyMap(drop_keys=["a.bb"]), KeyMap(select_keys=["a.bb"])):
        with pytest.raises(reweft.NotFoundError) as error:
            wrong.apply(keys)
        assert error.value.hint == 'did you mean "a.b"?'
    assert KeyMap(drop=["^z"]).report(keys).idle == ("drop ^z",)


def test_indexes_close_their_gaps_only_on_request_and_group_by_group() -> None:
    keys = ["fc.0.w", "fc.2.w", "fc.2.b", "fc.10.w", "blocks.3.fc.5.w", "blocks.3.fc.7.w", "head.4.w", "w2"]
    assert list(KeyMap().apply(keys).values()) == keys
    closed = KeyMap([{"renumber": True, "except": [r"^head\."]}]).apply(keys)
    assert list(closed.values()) == [
        "fc.0.w", "fc.1.w", "fc.1.b", "fc.2.w", "blocks.0.fc.0.w", "blocks.0.fc.1.w", "head.4.w", "w2",
    ]  # fmt: skip
    only = KeyMap([{"renumber": r"\.fc\.(\d+)\."}]).apply(keys)
    assert only["blocks.3.fc.7.w"] == "blocks.3.fc.1.w"
    assert only["fc.2.w"] == "fc.2.w"


def test_report_says_what_was_done() -> None:
    keys = KeyMap([("^m\\.", ""), {"match": "^w$", "split": ["a", "b"]}, ("^zzz", "")], drop=["^opt"])
    report = keys.report(["m.w", "m.v", "opt.step"])
    assert report.recipes == {"a": "m.w | part 0 of 2 along 0", "b": "m.w | part 1 of 2 along 0", "v": "m.v"}
    assert report.renamed == {"m.v": "v"}
    assert report.made == ("a", "b")
    assert report.dropped == ("opt.step",)
    assert report.idle == ("^zzz",)
    assert report.matches["^m\\."] == 2
    assert report.compare(["a", "v", "x"]) == (("x",), ("b",))
    with pytest.raises(reweft.UsageError) as error:
        keys.apply(["m.w"])
    assert_hints(error)


def test_report_of_an_opened_checkpoint(path: Path) -> None:
    assert reweft.open(path).key_report is None
    report = reweft.open(path, keys=KeyMap([("^attn", "a")], drop_keys=["steps"])).key_report
    assert report is not None
    assert report.dropped == ("steps",)
    assert report.renamed["attn.in_proj_bias"] == "a.in_proj_bias"


def test_top_level_key_of_a_file(tmp_path: Path) -> None:
    path = save({"state": {"module.w": torch.ones(2)}}, tmp_path / "x.pt")
    (tmp_path / "keys.toml").write_text("top_level_key = 'state'\n[[rules]]\nstrip_prefix = 'module.'\n")
    keys = KeyMap.open(tmp_path / "keys.toml")
    assert list(reweft.open(path, keys=keys)) == ["w"]
    assert repr(keys) == f"<KeyMap from {tmp_path / 'keys.toml'}>"
    # Without it the keys are others than those that the file was written for.
    with pytest.raises(reweft.UsageError) as error:
        reweft.open(path).rekey(keys)
    assert_hints(error)


def test_file_that_is_no_key_map_is_named_with_the_line(tmp_path: Path) -> None:
    wrong = tmp_path / "keys.toml"
    wrong.write_text("select = ['a']\nrulez = []\n")
    with pytest.raises(reweft.UsageError) as error:
        KeyMap.open(wrong)
    assert_says(error, wrong, "rulez", "line 2")
    with pytest.raises(reweft.IoError):
        KeyMap.open(tmp_path / "absent.toml")


def test_tensors_made_of_made_tensors_have_a_limit(path: Path) -> None:
    rules = [{"match": "^conv.weight$", "cast": ("float64", "float32")[number % 2]} for number in range(200)]
    with pytest.raises(reweft.LimitError):
        reweft.open(path, keys=KeyMap(rules))


def test_values_behind_conjugate_and_negative_bits(tmp_path: Path) -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    weights = {
        "conj": z.conj(),
        "imag": z.clone().conj().imag,
        "both": torch._neg_view(z.conj()),
        "neg": torch._neg_view(z),
        "strided": z.t().conj()[1:],
        "double": z.to(torch.complex128).conj(),
        "ints": torch._neg_view(torch.tensor([0, 1, -5, 2**62], dtype=torch.int64)),
        "half": torch._neg_view(torch.tensor([0.0, 1.5], dtype=torch.float16)),
        "plain": z,
    }
    for legacy in (False, True):
        path = tmp_path / "x.pt"
        torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
        for mmap in (False, True):
            checkpoint = reweft.open(path, mmap=mmap)
            assert not checkpoint.unreadable
            for key, tensor in torch.load(path).items():
                assert bytes(checkpoint[key].read()) == raw(tensor.resolve_conj().resolve_neg()), key
