"""Memory that refits must not cost: some torches' libraries forget what an update replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from support import child

if TYPE_CHECKING:
    from support import Package

# Anonymous memory is what the allocator has; file pages come and go with the page cache.
MEASURE = """
import gc, sys
import reweft.torch as rt

def anonymous():
    gc.collect()
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Anonymous:"))

def growth(job, times):
    for _ in range(times // 10):
        job()
    before = anonymous()
    for _ in range(times):
        job()
    return (anonymous() - before) / times

path, what, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = rt.load(path)
weights = model.state_dict()

def refit(copy=True):
    rt.replace_weights(model, weights, copy=copy)

def load():
    rt.replace_weights(rt.load(path), weights)

job = {"copied": refit, "shared": lambda: refit(copy=False), "loaded": load}[what]
print(growth(job, times), len(weights))
"""


@pytest.mark.parametrize(("what", "times"), [("copied", 5000), ("shared", 5000), ("loaded", 300)])
def test_refits_leave_no_memory_behind(
    digits: Package, capsys: pytest.CaptureFixture[str], what: str, times: int
) -> None:
    found = child(MEASURE, digits.path, what, times, timeout=300)
    assert found.returncode == 0, found.stderr
    nbytes, constants = (float(word) for word in found.stdout.split())
    with capsys.disabled():
        print(f"\ntorch {torch.__version__}, {what}: {nbytes:.1f} bytes per refit of {constants:.0f} constants")  # noqa: T201
    # A handle that is lost costs 32 bytes at least.
    assert nbytes < 16 * constants
