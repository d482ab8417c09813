"""What the command line asks of the allocator."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Pages that come anew while 64 MB are taken, filled and freed twenty times.
CODE = """
import resource, sys
import numpy as np
from knnlm.cli.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def work():
    block = bytearray(32 << 20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_taken_again():
    assert page_faults("kept") * 10 < page_faults("given back")
