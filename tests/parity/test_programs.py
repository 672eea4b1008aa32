"""Weights of TorchScript archives and exported programs: parity with `torch.jit.load` and `torch.export.load`."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import reweft
from make import zipped
from support import assert_hints, assert_says, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit is deprecated
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # so is its mobile interpreter
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # constants in a trace are what is wanted here
]


TRACE: Any = torch.jit.trace
QUANTISE: Any = torch.ao.quantization.quantize_dynamic


class Net(nn.Module):
    """Parameters, buffers, ties, views, attributes and constants."""

    if TYPE_CHECKING:  # not for torch.jit, which does not read annotations as text
        kept: torch.Tensor
        cache: torch.Tensor
        turned: torch.Tensor
        view: torch.Tensor
        halves: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.fc.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("view", self.fc.weight.detach()[1:])
        self.register_buffer("halves", torch.ones(2, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0, 2))
        self.attribute = torch.full((2,), 5.0)
        self.items = [torch.zeros(2), torch.ones(2)]
        self.count = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = self.attribute.sum() + self.items[0].sum() + self.kept.sum() + self.cache.sum() + self.turned.sum()
        more = more + self.view.sum() + self.halves.float().sum() + self.empty.sum()
        return torch.add(self.norm(self.fc(x) + self.tied(x)) + more, torch.tensor([1.0, 2.0, 3.0, 4.0]))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def assert_holds(checkpoint: reweft.Checkpoint, wanted: Mapping[str, torch.Tensor]) -> None:
    """Every tensor is there, bit for bit; the checkpoint may hold more."""
    assert checkpoint.unreadable == {}
    assert set(wanted) <= set(checkpoint)
    for key, value in wanted.items():
        info = checkpoint[key]
        assert (info.dtype, info.shape) == (str(value.dtype).removeprefix("torch."), tuple(value.shape)), key
        assert info.strides == value.stride(), key
        assert bytes(info.read()) == raw(value), key


class TestTorchScript:
    @pytest.mark.parametrize("how", ["script", "trace"])
    def test_state_dict(self, how: str, tmp_path: Path) -> None:
        path = tmp_path / "x.pt"
        program: Any = torch.jit.script(net()) if how == "script" else TRACE(net(), torch.ones(2, 3))
        program.save(str(path))
        wanted = torch.jit.load(str(path)).state_dict()  # type: ignore[no-untyped-call]
        for mmap in (False, True):
            checkpoint = reweft.open(path, mmap=mmap)
            assert checkpoint.format == "TorchScript"
            assert_holds(checkpoint, wanted)
        assert checkpoint["fc.weight"].storage == checkpoint["tied.weight"].storage == checkpoint["view"].storage
        assert checkpoint.unknown_globals == []

    def test_attributes_lists_and_values(self, tmp_path: Path) -> None:
        torch.jit.script(net()).save(str(tmp_path / "x.pt"))  # type: ignore[no-untyped-call]
        checkpoint = reweft.open(tmp_path / "x.pt")
        assert_holds(checkpoint, {"attribute": net().attribute, "items.0": torch.zeros(2), "items.1": torch.ones(2)})
        assert checkpoint.non_tensors["count"] == "int 3"

    @pytest.mark.parametrize("mobile", [False, True])
    def test_constants(self, mobile: bool, tmp_path: Path) -> None:  # noqa: FBT001
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
        frozen: Any = torch.jit.freeze(torch.jit.script(module))
        path = tmp_path / "x.ptl"
        if mobile:
            frozen._save_for_lite_interpreter(str(path))
        else:
            frozen.save(str(path))
        checkpoint = reweft.open(path)
        assert list(checkpoint) == ["constants.c0", "constants.c1", "constants.c2", "constants.c3"]
        found = [bytes(info.read()) for info in checkpoint.values()]
        assert sorted(found) == sorted(raw(value) for value in module.state_dict().values())

    def test_data_and_constants_have_storages_of_their_own(self, tmp_path: Path) -> None:
        """Both number from 0, in two folders."""
        program: Any = TRACE(net(), torch.ones(2, 3))
        program.save(str(tmp_path / "x.pt"))
        checkpoint = reweft.open(tmp_path / "x.pt")
        values = {key: checkpoint[key].numpy().tolist() for key in checkpoint if key.startswith("constants.")}
        assert [1.0, 2.0, 3.0, 4.0] in values.values()
        storages = {checkpoint[key].storage for key in values}
        assert storages.isdisjoint({checkpoint[key].storage for key in checkpoint if key not in values})

    def test_quantised(self, tmp_path: Path) -> None:
        module: Any = QUANTISE(nn.Sequential(nn.Linear(3, 4)), {nn.Linear})
        torch.jit.script(module).save(str(tmp_path / "x.pt"))
        weight, bias = module[0]._weight_bias()
        part = "0._packed_params._packed_params"
        wanted = {f"{part}.0.int_repr": weight.int_repr(), f"{part}.1": bias}
        assert_holds(reweft.open(tmp_path / "x.pt"), wanted)

    def test_top_level_key_is_a_module(self, tmp_path: Path) -> None:
        torch.jit.script(net()).save(str(tmp_path / "x.pt"))  # type: ignore[no-untyped-call]
        checkpoint = reweft.open(tmp_path / "x.pt", top_level_key="fc")
        assert list(checkpoint) == ["weight", "bias"]

    def test_attribute_that_is_named_like_a_constant(self, tmp_path: Path) -> None:
        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.c0 = nn.Parameter(torch.ones(1))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.c0

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.constants = Inner()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.as_tensor(self.constants(x) + torch.tensor([3.0]))

        program: Any = TRACE(Outer(), torch.ones(1))
        program.save(str(tmp_path / "x.pt"))
        with pytest.raises(reweft.KeyCollisionError, match=r"constants\.c0"):
            reweft.open(tmp_path / "x.pt")

    def test_big_endian(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pt"
        torch.jit.script(net()).save(str(path))  # type: ignore[no-untyped-call]
        wanted = net().state_dict()

        def turn(name: str, content: bytes) -> bytes:
            folder, _, number = name.partition("/")[2].partition("/")
            sizes = {"int64": 8, "float32": 4, "bfloat16": 2}
            if folder == "data" and number.isdigit():
                size = sizes[by_record[number]]
                return b"".join(content[at : at + size][::-1] for at in range(0, len(content), size))
            return b"big" if folder == "byteorder" else content

        plain = reweft.open(path)
        by_record: dict[str, str] = {}
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        for number in range(100):
            held = contents.get(f"x/data/{number}")
            matches = [info.dtype for info in plain.values() if bytes(info.read()) == held]
            by_record[str(number)] = matches[0] if matches else "float32"
        path.write_bytes(zipped({name: turn(name, content) for name, content in contents.items()}))
        assert_holds(reweft.open(path), wanted)


class TestExported:
    @pytest.fixture
    def program(self, tmp_path: Path) -> Path:
        exported = torch.export.export(net(), (torch.ones(2, 3),))
        torch.export.save(exported, tmp_path / "x.pt2")
        return tmp_path / "x.pt2"

    def test_state_dict(self, program: Path) -> None:
        loaded = torch.export.load(program)
        for mmap in (False, True):
            checkpoint = reweft.open(program, mmap=mmap)
            assert checkpoint.format == "exported program"
            assert_holds(checkpoint, loaded.state_dict)
            assert_holds(checkpoint, dict(loaded.constants))
        assert set(checkpoint) == set(loaded.state_dict) | set(loaded.constants)
        assert checkpoint["fc.weight"].storage == checkpoint["tied.weight"].storage == checkpoint["view"].storage

    def test_every_dtype(self, tmp_path: Path) -> None:
        names = [
            "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64", "complex128",
            "bool", "bfloat16", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
            "float8_e5m2fnuz", "float8_e8m0fnu", "complex32",
        ]  # fmt: skip

        class Holds(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name in names:
                    dtype = getattr(torch, name)
                    value = torch.zeros(3 * dtype.itemsize, dtype=torch.uint8)
                    value[:] = torch.arange(len(value)) % 2
                    self.register_buffer(f"w_{name}", value.view(dtype))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + 1

        path = tmp_path / "x.pt2"
        torch.export.save(torch.export.export(Holds(), (torch.ones(1),)), path)
        loaded = torch.export.load(path)
        checkpoint = reweft.open(path)
        assert set(checkpoint) == {f"w_{name}" for name in names}
        assert_holds(checkpoint, loaded.state_dict)

    def changed(self, program: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
        with zipfile.ZipFile(program) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        change(records)
        program.write_bytes(zipped(records))
        return program

    def config(
        self, program: Path, key: str, change: Callable[[dict[str, Any]], object], kind: str = "weights"
    ) -> Path:
        def edit(records: dict[str, bytes]) -> None:
            name = f"x/data/{kind}/model_{kind}_config.json"
            config = json.loads(records[name])
            change(config["config"][key])
            records[name] = json.dumps(config).encode()

        return self.changed(program, edit)

    def test_checkpoints_in_place_of_the_configuration(self, program: Path) -> None:
        loaded = torch.export.load(program)
        buffers = {"weights": io.BytesIO(), "constants": io.BytesIO()}
        torch.save(loaded.state_dict, buffers["weights"])
        torch.save(loaded.constants, buffers["constants"])

        def old(records: dict[str, bytes]) -> None:
            for kind, buffer in buffers.items():
                for name in [name for name in records if name.startswith(f"x/data/{kind}/")]:
                    del records[name]
                records[f"x/data/{kind}/model.pt"] = buffer.getvalue()

        checkpoint = reweft.open(self.changed(program, old))
        assert_holds(checkpoint, {**loaded.state_dict, **loaded.constants})
        assert checkpoint["fc.weight"].storage == checkpoint["tied.weight"].storage

    def test_files_of_torch_before_2_8(self, tmp_path: Path) -> None:
        buffers = [io.BytesIO(), io.BytesIO()]
        torch.save({"fc.weight": torch.ones(2, 3)}, buffers[0])
        torch.save({"lifted": torch.zeros(2)}, buffers[1])
        names = ["serialized_state_dict.pt", "serialized_constants.pt"]
        records = {name: buffer.getvalue() for name, buffer in zip(names, buffers, strict=True)}
        (tmp_path / "x.pt2").write_bytes(
            zipped({"serialized_exported_program.json": b"{}", "version": b"8.1", **records})
        )
        checkpoint = reweft.open(tmp_path / "x.pt2")
        assert_holds(checkpoint, {"fc.weight": torch.ones(2, 3), "lifted": torch.zeros(2)})

    def test_pickled_payload_is_read_by_our_own_reader(self, program: Path) -> None:
        buffer = io.BytesIO()
        torch.save(torch.arange(3.0), buffer)

        def swap(records: dict[str, bytes]) -> None:
            records["x/data/weights/pickled"] = buffer.getvalue()

        self.changed(program, swap)
        self.config(program, "kept", lambda row: row.update(path_name="pickled", use_pickle=True, tensor_meta=None))
        assert_holds(reweft.open(program), {"kept": torch.arange(3.0), "fc.bias": net().fc.bias})

    def test_pickled_payload_that_is_no_checkpoint(self, program: Path) -> None:
        def swap(records: dict[str, bytes]) -> None:
            records["x/data/weights/pickled"] = pickle.dumps(print)

        self.changed(program, swap)
        self.config(program, "kept", lambda row: row.update(path_name="pickled", use_pickle=True, tensor_meta=None))
        with pytest.raises(reweft.FormatError) as error:
            reweft.open(program)
        assert_says(error, program, "kept", "pickled")

    def test_custom_object_is_listed_as_unreadable(self, program: Path) -> None:
        def add(records: dict[str, bytes]) -> None:
            records["x/data/constants/custom_obj_0"] = b"anything"

        self.changed(program, add)
        row = {"path_name": "custom_obj_0", "use_pickle": True, "tensor_meta": None}
        self.config(program, "attribute", lambda old: old.update(row), "constants")
        assert "custom object" in reweft.open(program).unreadable["attribute"]

    def test_several_programs(self, program: Path) -> None:
        def twice(records: dict[str, bytes]) -> None:
            for name in list(records):
                if "/model" in name and "sample" not in name:
                    records[name.replace("/model_", "/other_").replace("/model.json", "/other.json")] = records[name]

        checkpoint = reweft.open(self.changed(program, twice))
        assert_holds(checkpoint, {"model.fc.bias": net().fc.bias, "other.fc.bias": net().fc.bias})
        assert "fc.bias" not in checkpoint

    CHANGES: dict[str, tuple[dict[str, Any], str]] = {  # noqa: RUF012
        "no_such_record": ({"path_name": "absent"}, "no such record"),
        "record_outside": ({"path_name": "../constants/tensor_0"}, "leaves its folder"),
        "no_meta": ({"tensor_meta": None}, "no tensor_meta"),
        "unknown_field": ({"compression": "zstd"}, "unknown field"),
        "other_record": ({"path_name": "weight_0"}, "storage has 0"),
    }

    @pytest.mark.parametrize("name", CHANGES)
    def test_row_that_contradicts(self, name: str, program: Path) -> None:
        change, what = self.CHANGES[name]
        self.config(program, "kept", lambda row: row.update(change))
        with pytest.raises(reweft.FormatError) as error:
            reweft.open(program)
        assert_says(error, program, what)

    METAS: dict[str, tuple[dict[str, Any], str]] = {  # noqa: RUF012
        "too_large": ({"sizes": [{"as_int": 4}]}, "storage has 12"),
        "negative": ({"sizes": [{"as_int": -3}]}, "size is -3"),
        "rank": ({"sizes": [{"as_int": 3}, {"as_int": 1}]}, "2 sizes and 1 strides"),
        "odd_bytes": ({"dtype": 8}, "no whole number"),
    }

    @pytest.mark.parametrize("name", METAS)
    def test_meta_that_contradicts(self, name: str, program: Path) -> None:
        change, what = self.METAS[name]
        self.config(program, "kept", lambda row: row["tensor_meta"].update(change))
        with pytest.raises(reweft.FormatError) as error:
            reweft.open(program)
        assert_says(error, program, "kept", what)

    UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {  # noqa: RUF012
        "dtype": ({"dtype": 99}, "code 99"),
        "layout": ({"layout": 1}, "layout"),
        "symbolic": ({"sizes": [{"as_expr": {"expr_str": "s0"}}]}, "before the program runs"),
    }

    @pytest.mark.parametrize("name", UNREADABLE)
    def test_what_is_not_known_is_unreadable(self, name: str, program: Path) -> None:
        change, what = self.UNREADABLE[name]
        self.config(program, "kept", lambda row: row["tensor_meta"].update(change))
        checkpoint = reweft.open(program)
        assert list(checkpoint.unreadable) == ["kept"]
        assert what in checkpoint.unreadable["kept"]

    def test_dtypes_that_share_a_record(self, program: Path) -> None:
        self.config(program, "tied.weight", lambda row: row["tensor_meta"].update(dtype=4))
        with pytest.raises(reweft.FormatError, match="two ways"):
            reweft.open(program)

    def test_name_that_is_there_twice(self, program: Path) -> None:
        def double(records: dict[str, bytes]) -> None:
            name = "x/data/weights/model_weights_config.json"
            records[name] = records[name].replace(b'"kept"', b'"fc.bias"')

        with pytest.raises(reweft.FormatError, match="twice"):
            reweft.open(self.changed(program, double))

    def test_name_among_weights_and_constants(self, program: Path) -> None:
        def double(records: dict[str, bytes]) -> None:
            name = "x/data/constants/model_constants_config.json"
            records[name] = records[name].replace(b'"attribute"', b'"fc.bias"')

        with pytest.raises(reweft.KeyCollisionError, match=r"fc\.bias"):
            reweft.open(self.changed(program, double))

    @pytest.mark.parametrize("record", ["archive_format", "archive_version"])
    def test_package_of_another_format(self, record: str, program: Path) -> None:
        def edit(records: dict[str, bytes]) -> None:
            records[f"x/{record}"] = b"7"

        with pytest.raises(reweft.UnsupportedError) as error:
            reweft.open(self.changed(program, edit))
        assert_says(error, program, record)

    def test_zero_bytes_are_not_read_as_zeros(self, program: Path) -> None:
        """torch takes an empty record for zeros of any shape."""

        def edit(records: dict[str, bytes]) -> None:
            name = next(name for name in records if records[name] == net().kept.numpy().tobytes())
            records[name] = b""

        with pytest.raises(reweft.FormatError, match="storage has 0"):
            reweft.open(self.changed(program, edit))

    def test_big_endian(self, program: Path) -> None:
        """torch takes the bytes as they are; the package says what they are."""
        wanted = torch.export.load(program).state_dict

        def turn(records: dict[str, bytes]) -> None:
            config = json.loads(records["x/data/weights/model_weights_config.json"])["config"]
            sizes = {row["path_name"]: wanted[key].element_size() for key, row in config.items()}
            for name, size in sizes.items():
                content = records[f"x/data/weights/{name}"]
                turned = [content[at : at + size][::-1] for at in range(0, len(content), size)]
                records[f"x/data/weights/{name}"] = b"".join(turned)
            records["x/byteorder"] = b"big"

        self.changed(program, turn)
        for mmap in (False, True):
            assert_holds(reweft.open(program, mmap=mmap), wanted)

    def test_memory_and_file_agree(self, program: Path) -> None:
        held, read = reweft.open(program.read_bytes()), reweft.open(program)
        assert [(key, bytes(info.read())) for key, info in held.items()] == [
            (key, bytes(info.read())) for key, info in read.items()
        ]

    def test_top_level_key_is_refused(self, program: Path) -> None:
        with pytest.raises(reweft.NotFoundError) as error:
            reweft.open(program, top_level_key="fc")
        assert_hints(error)
