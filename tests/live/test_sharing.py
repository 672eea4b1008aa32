"""Weights that are shared with a trainer or another model, state that is kept, and versions of weights."""

from __future__ import annotations

import gc
import json
import struct
import threading
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

import models
import reweft
import reweft.torch as rt
from reweft import _core
from support import assert_hints, assert_same, assert_says, beside, differs, record_at, save_state, with_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from support import Package


def read_by_program(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in module.state_dict().items() if "num_batches" not in key}


def patch_slot(package: Path, out: Path) -> str:
    """Change a slot as somebody would who knows the archive and not the manifest: with right CRCs. Gives its name."""
    data = bytearray(package.read_bytes())
    with zipfile.ZipFile(package) as archive:
        manifest = json.loads(archive.read(next(name for name in archive.namelist() if "reweft_manifest" in name)))
        record = archive.getinfo(manifest["weights"])
    start, nbytes = record_at(package, record.filename)
    slot = manifest["slots"][0]
    data[start + slot["byte_offset"]] ^= 0x10
    after = zlib.crc32(data[start : start + nbytes])
    # Stated in the directory, and behind the record or before it.
    head, tail = data[:start], data[start + nbytes :]
    old, new = struct.pack("<I", record.CRC), struct.pack("<I", after)
    out.write_bytes(head.replace(old, new) + data[start : start + nbytes] + tail.replace(old, new))
    return str(slot["name"])


class TestSharedWithATrainer:
    """`copy=False`."""

    def test_edit_in_place_shows_at_once(self, digits: Package) -> None:
        model, module = digits.load(), digits.module(1)
        report = rt.replace_weights(model, module, copy=False)
        assert report.bytes_copied == 0
        assert report.nbytes == sum(value.nbytes for value in read_by_program(module).values())
        assert not any("copied" in notice for notice in report.notices)
        before = model(*digits.inputs)
        with torch.no_grad():
            for key, value in digits.module(2).state_dict().items():
                module.state_dict()[key].copy_(value)
        assert differs(model(*digits.inputs), before)
        other = digits.load()
        rt.replace_weights(other, digits.module(2))
        assert_same(model(*digits.inputs), other(*digits.inputs))
        assert_same(model.state_dict(), other.state_dict())

    def test_without_it_no_edit_shows(self, digits: Package) -> None:
        model, module = digits.load(), digits.module(1)
        report = rt.replace_weights(model, module)
        assert report.bytes_copied == report.nbytes
        before = model(*digits.inputs)
        module.get_parameter("fc.bias").data.fill_(9)
        assert_same(model(*digits.inputs), before)

    def test_memory_is_held_when_the_trainer_drops_it(self, digits: Package) -> None:
        model, module = digits.load(), digits.module(1)
        rt.replace_weights(model, module, copy=False)
        wanted = model(*digits.inputs)
        shapes = [value.shape for value in module.state_dict().values()]
        del module
        gc.collect()
        garbage = [torch.full(shape, 7.0) for shape in shapes for _ in range(20)]
        assert_same(model(*digits.inputs), wanted)
        del garbage

    def test_what_does_not_fit_is_copied_counted_and_named(self, digits: Package) -> None:
        model, module = digits.load(), digits.module(1)
        state = read_by_program(module)
        state["fc.weight"] = state["fc.weight"].double()
        state["conv2.weight"] = state["conv2.weight"].to(memory_format=torch.channels_last)
        report = rt.replace_weights(model, state, copy=False, allow_cast=True)
        assert report.bytes_copied == 4 * (state["fc.weight"].numel() + state["conv2.weight"].numel())
        (notice,) = [notice for notice in report.notices if "copied and not shared" in notice]
        assert "fc.weight" in notice
        assert "conv2.weight" in notice
        assert "fc.bias" not in notice
        before = model(*digits.inputs)
        state["fc.weight"].zero_()
        state["conv2.weight"].zero_()
        assert_same(model(*digits.inputs), before)
        state["fc.bias"].add_(1)
        assert differs(model(*digits.inputs), before)

    def test_memory_at_an_odd_address_is_copied(self, digits: Package) -> None:
        model, state = digits.load(), read_by_program(digits.module(1))
        value = state["fc.bias"]
        storage = bytearray(b"\0" + value.numpy().tobytes())
        odd = torch.frombuffer(storage, dtype=torch.uint8)[1:]
        if odd.data_ptr() % 4 == 0:
            pytest.skip("the allocator gave an odd address")
        state["fc.bias"] = torch.frombuffer(storage, dtype=torch.float32, offset=1)
        report = rt.replace_weights(model, state, copy=False)
        assert report.bytes_copied == value.nbytes
        wanted = digits.load()
        rt.replace_weights(wanted, digits.module(1))
        assert_same(model(*digits.inputs), wanted(*digits.inputs))

    def test_lazily_conjugated_weights_are_copied_and_named(self, mixed: Package) -> None:
        model, module = mixed.load(), mixed.module(1)
        state = dict(module.state_dict())
        key = next(key for key, value in state.items() if value.is_complex())
        state[key] = state[key].conj()
        report = rt.replace_weights(model, state, copy=False)
        assert report.bytes_copied == state[key].nbytes
        assert any(key in notice and "copied" in notice for notice in report.notices)
        assert_same(model.state_dict()[key], state[key].resolve_conj())

    def test_buffers_that_the_program_writes_stay_the_trainers(self, counter: Package) -> None:
        model, module = counter.load(), counter.module(1)
        report = rt.replace_weights(model, module.state_dict(), copy=False)
        assert report.bytes_copied == 4 * 4 + 8
        model(*counter.inputs)
        assert int(module.get_buffer("calls")) == 0
        assert int(model.state_dict()["calls"]) == 1

    def test_of_two_tensors_that_are_tied_in_the_model_one_is_followed(self, tied: Package) -> None:
        model, module = tied.load(), tied.module(1)
        first = module.get_parameter("embedding.weight").detach()
        state = {"embedding.weight": first, "head.weight": first.clone()}
        report = rt.replace_weights(model, state, copy=False)
        assert any("embedding.weight" in notice and "head.weight" in notice for notice in report.notices)
        before = model(*tied.inputs)
        state["head.weight"].zero_()
        assert_same(model(*tied.inputs), before)
        first.zero_()
        assert differs(model(*tied.inputs), before)
        quiet = rt.replace_weights(tied.load(), tied.module(1), copy=False)
        assert not any("head.weight" in notice for notice in quiet.notices)

    def test_saved_package_has_the_values_of_now(self, digits: Package, tmp_path: Path) -> None:
        model, module = digits.load(), digits.module(1)
        rt.replace_weights(model, module, copy=False)
        module.get_parameter("fc.bias").data.fill_(3)
        rt.save(model, tmp_path / "now.pt2")
        assert_same(rt.load(tmp_path / "now.pt2")(*digits.inputs), model(*digits.inputs))

    def test_refits_readers_and_the_garbage_collector_do_not_wait_for_ever(self, half_width: Package) -> None:
        """Dropping shared tensors takes the interpreter lock, which others may hold while they wait."""
        model, done = half_width.load(replicas=2), threading.Event()
        failed: list[BaseException] = []

        def guarded(job: Any) -> None:
            try:
                while not done.is_set():
                    job()
            except BaseException as error:  # noqa: BLE001  (told to the main thread)
                failed.append(error)

        jobs = [
            *(lambda seed=seed: rt.replace_weights(model, half_width.module(seed), copy=False) for seed in range(3)),
            lambda: model(*half_width.inputs),
            model.state_dict,
            lambda: model.weights_version,
            gc.collect,
        ]
        threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        done.wait(5)
        done.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert failed == []


class TestAnotherModelAsSource:
    def test_nothing_is_copied_and_each_goes_its_own_way(self, digits: Package) -> None:
        one, other = digits.load(), digits.load()
        rt.replace_weights(one, digits.module(1))
        report = rt.replace_weights(other, one)
        assert (report.bytes_copied, report.kept) == (0, ())
        wanted = one(*digits.inputs)
        assert_same(other(*digits.inputs), wanted)
        rt.replace_weights(one, digits.module(2))
        assert differs(one(*digits.inputs), wanted)
        assert_same(other(*digits.inputs), wanted)
        del one
        gc.collect()
        assert_same(other(*digits.inputs), wanted)

    def test_weights_that_a_trainer_shares_with_it_are_copied(self, digits: Package) -> None:
        one, other, module = digits.load(), digits.load(), digits.module(1)
        rt.replace_weights(one, module, copy=False)
        rt.replace_weights(other, one)
        wanted = other(*digits.inputs)
        module.get_parameter("fc.bias").data.fill_(9)
        assert_same(other(*digits.inputs), wanted)
        assert differs(one(*digits.inputs), wanted)

    def test_state_is_copied(self, counter: Package) -> None:
        one, other = counter.load(), counter.load()
        one(*counter.inputs)
        assert rt.replace_weights(other, one).bytes_copied == 4 * 4 + 8
        one(*counter.inputs)
        assert int(other(*counter.inputs)[1]) == 2
        assert int(one(*counter.inputs)[1]) == 3

    def test_model_of_another_architecture_is_refused(self, digits: Package, tied: Package) -> None:
        with pytest.raises(reweft.MismatchError):
            rt.replace_weights(digits.load(), tied.load())

    def test_key_map_applies(self, digits: Package) -> None:
        with pytest.raises(reweft.MismatchError):
            rt.replace_weights(digits.load(), digits.load(), keys=reweft.KeyMap([(r"^fc\.", "head.")]))

    def test_itself(self, digits: Package) -> None:
        model = digits.load()
        wanted = model(*digits.inputs)
        assert rt.replace_weights(model, model).bytes_copied == 0
        assert_same(model(*digits.inputs), wanted)


class TestState:
    """Buffers that the program writes to."""

    def test_keep_leaves_them_whether_they_are_given_or_not(self, counter: Package) -> None:
        module = models.seeded(models.Counter, 1)
        module.calls.fill_(40)
        for weights in (module, module.state_dict(), {"weight": module.weight}):
            model = counter.load()
            model(*counter.inputs)
            report = rt.replace_weights(model, weights, state="keep")
            assert set(report.kept) == {"total", "calls"}
            product, calls = model(*counter.inputs)
            assert int(calls) == 2
            assert torch.equal(product, 2 * counter.inputs[0] * module.weight.detach())

    def test_replace_takes_them(self, counter: Package) -> None:
        module = models.seeded(models.Counter, 1)
        module.calls.fill_(40)
        model = counter.load()
        assert rt.replace_weights(model, module, state="replace").kept == ()
        assert int(model(*counter.inputs)[1]) == 41
        with pytest.raises(reweft.MismatchError):
            rt.replace_weights(model, {"weight": module.weight})

    def test_anything_else_is_refused(self, counter: Package) -> None:
        with pytest.raises(reweft.UsageError, match="state"):
            rt.replace_weights(counter.load(), counter.module(0), state="reset")  # type: ignore[arg-type]


class TestStrict:
    def test_not_strict_takes_what_fits_and_leaves_the_rest(self, digits: Package) -> None:
        model, state = digits.load(), digits.module(1).state_dict()
        old = model.state_dict()
        report = rt.replace_weights(model, {"fc.bias": state["fc.bias"], "more": torch.ones(1)}, strict=False)
        assert report.slots == 1
        assert_same(model.state_dict(), {**old, "fc.bias": state["fc.bias"]})

    def test_one_of_both_can_be_asked_for(self, digits: Package) -> None:
        state = {"fc.bias": digits.module(1).state_dict()["fc.bias"]}
        refused: list[dict[str, Any]] = [{}, {"strict": False, "allow_missing": False}, {"allow_unused": True}]
        for keywords in refused:
            with pytest.raises(reweft.MismatchError):
                rt.replace_weights(digits.load(), state, **keywords)
        rt.replace_weights(digits.load(), state, allow_missing=True)

    def test_other_shape_is_refused_all_the_same(self, digits: Package) -> None:
        with pytest.raises(reweft.MismatchError):
            rt.replace_weights(digits.load(), {"fc.bias": torch.ones(5)}, strict=False)


def test_model_without_weights_warns(weightless: Package) -> None:
    model = weightless.load()
    with pytest.warns(UserWarning, match="no weights"):
        report = rt.replace_weights(model, weightless.kind())
    assert report.slots == 0
    assert_same(model(*weightless.inputs), weightless.kind()(*weightless.inputs))


class TestVersion:
    def test_follows_the_weights_and_comes_back(self, digits: Package, tmp_path: Path) -> None:
        model = digits.load()
        first = model.weights_version
        paths = [save_state(digits.module(seed), tmp_path / f"{seed}.pt") for seed in (0, 1)]
        rt.replace_weights(model, paths[1])
        second = model.weights_version
        assert second != first
        rt.replace_weights(model, paths[0])
        assert model.weights_version == first
        rt.replace_weights(model, digits.module(1))
        assert model.weights_version == second
        rt.save(model, tmp_path / "b.pt2")
        assert rt.load(tmp_path / "b.pt2").weights_version == second
        assert digits.load(replicas=2).weights_version == first

    @pytest.mark.parametrize("name", ["digits", "tied", "mixed", "views", "half_width", "recurrent"])
    def test_any_change_of_any_slot_changes_it(self, name: str, request: pytest.FixtureRequest) -> None:
        package: Package = request.getfixturevalue(name)
        model = package.load()
        state, seen = model.state_dict(), {model.weights_version}
        for names in model.slots():
            changed = state[names[0]].clone()
            flat = changed.view(-1)
            flat[-1] = flat[-1] + 1
            rt.replace_weights(model, {names[0]: changed}, strict=False)
            assert model.weights_version not in seen
            seen.add(model.weights_version)
        rt.replace_weights(model, state)
        assert model.weights_version in seen
        assert model.weights_version == package.load().weights_version

    def test_layout_of_the_source_does_not_matter(self, digits: Package) -> None:
        model, state = digits.load(), digits.module(0).state_dict()
        wanted = model.weights_version
        state["conv2.weight"] = state["conv2.weight"].to(memory_format=torch.channels_last)
        rt.replace_weights(model, state)
        assert model.weights_version == wanted

    def test_inspect_prints_it(self, package: Package, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        refitted = tmp_path / "b.pt2"
        reweft.refit(package.path, save_state(package.module(1), tmp_path / "b.pt"), out=refitted)
        versions = set()
        for path in (package.path, refitted):
            version = rt.load(path).weights_version
            assert _core.main(["reweft", "inspect", str(path)]) == 0
            assert f"\nweights version: {version}\n" in capfd.readouterr().out
            assert _core.main(["reweft", "inspect", "--json", str(path)]) == 0
            assert json.loads(capfd.readouterr().out)["weights_version"] == version
            versions.add(version)
        assert len(versions) == 2

    @pytest.mark.parametrize("name", ["digits", "mixed"])
    @pytest.mark.parametrize("how", ["mapped", "copied"])
    def test_weights_that_are_not_those_of_the_manifest(
        self, name: str, how: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        package: Package = request.getfixturevalue(name)
        patched, slot = tmp_path / "x.pt2", patch_slot(package.path, tmp_path / "x.pt2")
        if how == "copied":
            # Records that begin anywhere are not aligned, so their weights are copied when they are loaded.
            patched = with_manifest(patched, tmp_path / "y.pt2", lambda _manifest: None)
        model = rt.load(patched)
        with pytest.raises(reweft.FormatError) as error:
            _ = model.weights_version
        assert_says(error, patched, slot, "manifest")
        assert_hints(error)
        assert error.value.key == slot
        rt.replace_weights(model, package.module(0))
        assert model.weights_version == package.load().weights_version

    def test_state_is_not_part_of_it(self, counter: Package) -> None:
        model = counter.load()
        wanted = model.weights_version
        model(*counter.inputs)
        assert model.weights_version == wanted
        rt.replace_weights(model, counter.module(1))
        assert model.weights_version != wanted

    def test_shared_tensors_are_read_each_time(self, digits: Package) -> None:
        model, module = digits.load(), digits.module(0)
        wanted = model.weights_version
        rt.replace_weights(model, module, copy=False)
        assert model.weights_version == wanted
        module.get_parameter("fc.bias").data.add_(1)
        assert model.weights_version != wanted
        module.get_parameter("fc.bias").data.copy_(digits.module(0).get_parameter("fc.bias"))
        assert model.weights_version == wanted

    def test_beside_refits_it_is_one_of_two(self, digits: Package) -> None:
        model, wanted, seen = digits.load(), set(), set()
        states = [digits.module(seed).state_dict() for seed in (0, 1)]
        for state in states:
            rt.replace_weights(model, state)
            wanted.add(model.weights_version)

        with beside(lambda: seen.add(model.weights_version)):
            for number in range(300):
                rt.replace_weights(model, states[number % 2])
        assert seen
        assert seen <= wanted


class TestChunks:
    """`run_chunks`, which batching is made of."""

    @staticmethod
    def run(model: rt.CompiledModule, chunks: Sequence[tuple[torch.Tensor, ...]]) -> list[list[torch.Tensor]]:
        return model._core.run_chunks([list(chunk) for chunk in chunks])

    @pytest.mark.parametrize("replicas", [1, 2, 3])
    @pytest.mark.parametrize("count", [0, 1, 2, 7])
    def test_outputs_come_in_order(self, replicas: int, count: int, digits: Package) -> None:
        model = digits.load(replicas=replicas)
        chunks = [(torch.randn(2, 1, 8, 8),) for _ in range(count)]
        outputs = self.run(model, chunks)
        assert len(outputs) == count
        for chunk, (output,) in zip(chunks, outputs, strict=True):
            assert_same(output, model(*chunk))

    def test_all_chunks_of_an_answer_have_one_set_of_weights(self, digits: Package) -> None:
        model = digits.load(replicas=2)
        states = [digits.module(seed).state_dict() for seed in (0, 1)]
        wanted = []
        for state in states:
            rt.replace_weights(model, state)
            wanted.append(model(*digits.inputs))
        seen, mixed_up = [0, 0], 0

        def serve() -> None:
            nonlocal mixed_up
            outputs = [one for (one,) in self.run(model, [digits.inputs] * 6)]
            matches = [all(torch.equal(output, one) for output in outputs) for one in wanted]
            mixed_up += not any(matches)
            for number, match in enumerate(matches):
                seen[number] += match

        with beside(serve):
            for number in range(600):
                rt.replace_weights(model, states[number % 2])
        assert mixed_up == 0
        assert sum(seen) > 0

    def test_chunks_of_a_program_with_state_follow_one_another(self, counter: Package) -> None:
        outputs = self.run(counter.load(), [counter.inputs] * 5)
        assert [int(calls) for _, calls in outputs] == [1, 2, 3, 4, 5]

    def test_input_that_does_not_fit_is_refused_before_any_chunk_runs(self, counter: Package) -> None:
        model = counter.load()
        with pytest.raises(reweft.MismatchError):
            self.run(model, [counter.inputs, (torch.ones(5),)])
        assert int(model.state_dict()["calls"]) == 0
        assert int(model(*counter.inputs)[1]) == 1


def test_errors_of_a_stripped_model_name_slots_and_a_way_out(digits: Package, tmp_path: Path) -> None:
    reweft.strip(digits.path, tmp_path / "s.pt2")
    model = rt.load(tmp_path / "s.pt2")
    looks: list[Any] = [
        lambda: model(*digits.inputs),
        model.state_dict,
        lambda: model.weights_version,
        lambda: rt.save(model, tmp_path / "x.pt2"),
        lambda: rt.replace_weights(digits.load(), model),
        lambda: TestChunks.run(model, [digits.inputs] * 2),
    ]
    for look in looks:
        with pytest.raises(reweft.RunError, match=r"no weights for \d+ slots: .*conv1.weight") as error:
            look()
        assert_hints(error)
    assert not (tmp_path / "x.pt2").exists()
