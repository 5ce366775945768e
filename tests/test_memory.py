"""What is freed stays at hand: no page is cleared twice."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from mmengine.runner import Runner

from visadapt import engine

FAULTS = """
import resource, sys
from visadapt.memory import keep_freed
kept = keep_freed() if sys.argv[1] == "kept" else None
def step():
    blocks = [bytearray(b"x") * 2**22 for _ in range(16)] + [bytearray(b"x") * 2**26]
    small = bytearray(100)
    del blocks
    return small
held = [step(), step()]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held += [step(), step()]
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, how]
    found = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True).stdout.split()
    return found[0], int(found[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_unless_the_user_has_set_it_otherwise():
    mapped = 2 * 2**26 // os.sysconf("SC_PAGE_SIZE")  # pages of the largest block in the two steps counted
    assert faults("plain")[1] > mapped / 2
    kept, count = faults("kept")
    assert kept == "True" and count < mapped / 100
    kept, count = faults("kept", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False" and count > mapped / 2
    assert faults("kept", GLIBC_TUNABLES="glibc.malloc.mmap_max=0")[0] == "False"


def test_training_keeps_freed_memory_from_its_start(monkeypatch):
    calls = []
    monkeypatch.setattr(engine, "keep_freed", lambda: calls.append("kept"))
    monkeypatch.setattr(Runner, "train", lambda self: calls.append("trained"))
    engine.AdaptRunner.train(object.__new__(engine.AdaptRunner))
    assert calls == ["kept", "trained"]
