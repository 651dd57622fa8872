"""What importing the package loads, and what it offers."""

from __future__ import annotations

import re
import subprocess
import sys

import superblock
from superblock.version import version


def test_importing_loads_neither_triton_nor_torchvision_nor_the_native_library() -> None:
    code = (
        "import sys, superblock; print([name for name in sys.modules if name.split('.')[0] in "
        "('triton', 'torchvision', 'timm', 'matplotlib', 'rich', 'sklearn')]);"
        "print('superblock_cpu' in open('/proc/self/maps').read())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "False"]


def test_the_public_names_are_few_and_documented() -> None:
    assert len(superblock.__all__) <= 15
    for name in superblock.__all__:
        assert getattr(superblock, name).__doc__


def test_the_version_is_a_version() -> None:
    assert re.match(r"\d+\.\d+|0\+source", version())
