"""Forks, threads and signals: each in a process of its own, with a time limit, so that what hangs fails."""

from __future__ import annotations

import re
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import models
import reweft
import reweft.torch as rt
from support import assert_same, child

if TYPE_CHECKING:
    from pathlib import Path

    from support import Package

TIMEOUT = 60


class Wide(nn.Module):
    """Large enough for loops and operators to be split among threads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.tanh(self.linear(torch.sin(x))).cumsum(0)
        return out


class Slow(nn.Module):
    """A call takes about a second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(12):
            x = x @ self.weight
        return x


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled for two threads, whatever this machine has."""
    path, before = tmp_path_factory.mktemp("packages") / "wide.pt2", torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rt.save(rt.trace(models.seeded(Wide, 0), torch.randn(512, 512)), path)
    finally:
        torch.set_num_threads(before)
    return path


def baked(path: Path) -> int:
    """The threads that the generated loops state."""
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp")]
    return max([1, *(int(count) for text in texts for count in re.findall(r"num_threads\((\d+)\)", text))])


def stating_threads(package: Path, out: Path) -> Path:
    """A copy whose sources say what the compiler writes for a fixed number of threads; the library is the same."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(".kernel.cpp"):
                data = data.replace(b"#pragma omp parallel\n", b"#pragma omp parallel num_threads(2)\n")
            target.writestr(name, data)
    assert baked(out) == 2
    return out


# Loads and calls in the parent, forks, and does what argv[3] says in the child; prints what came of it.
FORK = """
import os, sys, threading, torch, reweft, reweft.torch as rt
torch.set_num_threads(2)
path, shape, how = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
x = torch.ones(shape)
model = rt.load(path)
wanted = model(x)
torch.randn(2000, 2000).sum()  # the pool of threads exists now
state = model.state_dict()
stop = threading.Event()
if how == "busy":
    def serve():
        while not stop.is_set():
            model(x)
    thread = threading.Thread(target=serve)
    thread.start()
    sys.setswitchinterval(1e-4)
pid = os.fork()
if pid == 0:
    try:
        if how == "reload":
            model = rt.load(path)
        if how == "refit":
            rt.replace_weights(model, {key: value + 1 for key, value in state.items()})
            found = model(x)
            print("refitted", found.numpy().tobytes() != wanted.numpy().tobytes())
            rt.replace_weights(model, state)
        found = model(x)
        torch.set_num_threads(1)  # torch's own operators would wait for threads that are gone
        print("same" if torch.allclose(found, wanted, atol=1e-5) else "other")
    except reweft.RunError as error:
        print("RunError", str(error).replace("\\n", " "))
    sys.stdout.flush()
    os._exit(0)
_, status = os.waitpid(pid, 0)
stop.set()
print("parent", status, torch.allclose(model(x), wanted, atol=1e-5))
"""


def forked(package: Path, shape: tuple[int, ...], how: str) -> list[str]:
    done = child(FORK, package, shape, how, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    *said, parent = done.stdout.splitlines()
    assert parent == "parent 0 True"
    return said


@pytest.mark.parametrize("how", ["plain", "reload", "refit"])
def test_a_forked_child_computes_what_its_parent_does(how: str, digits: Package) -> None:
    assert baked(digits.path) == 1
    said = forked(digits.path, (2, 1, 8, 8), how)
    assert said == (["refitted True", "same"] if how == "refit" else ["same"])


def test_a_child_never_waits_for_threads_that_are_gone(wide: Path) -> None:
    """With two threads it would: the loops of the program are parallel, and the parent has run them."""
    (said,) = forked(wide, (512, 512), "plain")
    assert said == "same" if baked(wide) == 1 else said.startswith("RunError ")


def test_a_child_is_told_of_loops_of_a_fixed_number_of_threads(wide: Path, tmp_path: Path) -> None:
    (said,) = forked(stating_threads(wide, tmp_path / "fixed.pt2"), (512, 512), "plain")
    assert said.startswith("RunError ")
    assert "2 threads" in said
    assert "forked" in said
    assert "hint: " in said


def test_a_model_that_was_busy_at_the_fork_is_refused_or_works(digits: Package) -> None:
    said = forked(digits.path, (2, 1, 8, 8), "busy")
    assert said == ["same"] or (said[0].startswith("RunError ") and "another thread" in said[0])


# Whether a child of a model that is busy for sure is refused.
BUSY = """
import os, sys, threading, time, torch, reweft, reweft.torch as rt
model, x = rt.load(sys.argv[1]), torch.ones(1024, 1024)
thread = threading.Thread(target=lambda: model(x))
thread.start()
time.sleep(0.05)
busy = thread.is_alive()
pid = os.fork()
if pid == 0:
    try:
        model(x)
        print("ran", busy, flush=True)
    except reweft.RunError as error:
        print("refused", busy, flush=True)
    rt.load(sys.argv[1])(x)
    print("loaded again", flush=True)
    os._exit(0)
_, status = os.waitpid(pid, 0)
print(status)
"""

# A call is interrupted: the exception comes when it returns, and the model works on. Whoever runs these tests in the
# background has shells ignore Ctrl-C for them.
INTERRUPT = """
import os, signal, sys, threading, time, torch, reweft.torch as rt
signal.signal(signal.SIGINT, signal.default_int_handler)
model, x = rt.load(sys.argv[1]), torch.ones(1024, 1024)
started = time.monotonic()
wanted = model(x)
once = time.monotonic() - started
timer = threading.Timer(once / 10, lambda: os.kill(os.getpid(), signal.SIGINT))
timer.start()
started, calls = time.monotonic(), 0
try:
    while calls < 50:
        model(x)
        calls += 1
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - started < 20 * once + 5)
print(torch.equal(model(x), wanted))
"""


# A call that waits behind another one of thirty seconds is left by Ctrl-C at once, and by whatever a handler raises.
QUEUED = """
import os, signal, sys, threading, time, torch, reweft.torch as rt
signal.signal(signal.SIGINT, signal.default_int_handler)
model, x = rt.load(sys.argv[1]), torch.ones(1024, 1024)
model(x)
busy = threading.Thread(target=lambda: model._run_chunks([[x]] * 1000), daemon=True)
busy.start()
time.sleep(0.3)  # it holds the only replica until all chunks are done

def handled(number, frame):
    handled.count += 1
    if handled.count == 2:
        raise ValueError("from the handler")
handled.count = 0
signal.signal(signal.SIGUSR1, handled)
for signals, wanted in [((signal.SIGINT,), KeyboardInterrupt), ((signal.SIGUSR1, signal.SIGUSR1), ValueError)]:
    def send():
        for number in signals:
            time.sleep(0.3)
            os.kill(os.getpid(), number)
    threading.Thread(target=send).start()
    started = time.monotonic()
    try:
        model(x)
        print("ran")
    except wanted:
        print("left", time.monotonic() - started < 10, busy.is_alive())
sys.stdout.flush()
os._exit(0)
"""

# Lent memory whose end is somebody's code, which uses the model: inside the refit that lets go of it.
FINALIZER = """
import sys, weakref, numpy, torch, reweft, reweft.torch as rt
model, said = rt.load(sys.argv[1]), []
state = model.state_dict()

def gone():
    x = torch.ones(2, 1, 8, 8)
    for use in (lambda: rt.replace_weights(model, state), lambda: model.weights_version, lambda: model(x)):
        try:
            use()
        except reweft.UsageError as error:
            said.append("inside" in str(error))

bias = numpy.ones(4, dtype="float32")
weakref.finalize(bias, gone)
rt.replace_weights(model, {**state, "fc.bias": torch.from_numpy(bias)}, copy=False)
del bias
assert not said
rt.replace_weights(model, state)
print(said)
print(rt.load(sys.argv[1]).weights_version == model.weights_version)
"""


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packages") / "slow.pt2"
    rt.save(rt.trace(Slow().eval(), torch.ones(1024, 1024)), path)
    return path


def test_a_model_that_is_busy_at_the_fork_is_refused_in_the_child(slow: Path) -> None:
    done = child(BUSY, slow, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused True", "loaded again", "0"]


def test_an_interrupt_is_delivered_when_the_call_returns(slow: Path) -> None:
    done = child(INTERRUPT, slow, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["interrupted True", "True"]


def test_a_call_that_waits_for_a_replica_can_be_left(slow: Path) -> None:
    done = child(QUEUED, slow, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["left True True", "left True True"]


def test_a_model_that_is_used_from_inside_its_own_refit_says_so(digits: Package) -> None:
    done = child(FINALIZER, digits.path, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[True, True, True]", "True"]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_set_for_the_call_alone(threads: int, digits: Package) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = rt.load(digits.path, threads=threads)
        assert_same(model(*digits.inputs), digits.load()(*digits.inputs))
        assert torch.get_num_threads() == 2
        with pytest.raises(reweft.MismatchError):
            model(torch.zeros(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_loops_of_a_fixed_number_of_threads_are_a_warning(wide: Path, tmp_path: Path) -> None:
    fixed = stating_threads(wide, tmp_path / "fixed.pt2")
    with pytest.warns(rt.HostWarning, match="2 threads"):
        rt.load(fixed, threads=1)
    rt.load(fixed, threads=2)
    rt.load(fixed)


def test_options_that_cannot_be_are_errors(digits: Package) -> None:
    for threads in (0, -1, 1 << 20):
        with pytest.raises(reweft.UsageError, match="threads"):
            rt.load(digits.path, threads=threads)
    with pytest.raises(reweft.UsageError, match=r"cuda.*cpu"):
        rt.load(digits.path, device="cuda:0")
    with pytest.raises(reweft.UsageError, match="nowhere"):
        rt.load(digits.path, device="nowhere")
    model = rt.load(digits.path, device=torch.device("cpu"), single_threaded=True)
    assert torch.allclose(model(*digits.inputs), digits.eager(0), atol=1e-5)
