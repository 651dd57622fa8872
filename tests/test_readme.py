"""The README's example runs as it stands, and its signatures are the package's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import superblock

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("name", superblock.__all__)
def test_every_public_name_is_in_the_readme(name: str) -> None:
    assert re.search(rf"`[^`]*\b{name}\b", README), f"{name} is public but not in the README"
