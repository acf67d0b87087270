"""What is set for a whole process is tried in one of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from headrace.lifecycle.memory import keep_buffers
keep_buffers()
def messages():
    for _ in range(20):
        [bytearray(602_112) for _ in range(16)]
messages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
messages()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 20 * 16 * 602_112 // 4096


def page_faults(**environment: str) -> int:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_messages_take_the_memory_of_those_before_them_unless_the_operator_says_otherwise() -> None:
    assert page_faults() < PAGES / 10
    assert page_faults(MALLOC_TRIM_THRESHOLD_="131072") > PAGES / 2
