"""Files are complete or absent, and nothing in a checkpoint is executed."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch

from superblock.errors import CheckpointError
from superblock.files import read_checkpoint, write_atomically, write_checkpoint

NO_CHECKPOINT = r"a\.pth (is truncated or not a checkpoint: use an earlier one|.* was not loaded)"


def test_round_trip_with_the_arguments_of_a_training_script(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth", {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)})
    content = read_checkpoint(tmp_path / "a.pth")
    assert content["args"].lr == 0.1
    assert content["model"]["w"].tolist() == [1, 1]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"epoch": 1})

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot write .*a\.pth: No space left on device; nothing was changed"):
        write_atomically(path, fail)
    assert read_checkpoint(path) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*: (Not a directory|File exists); nothing was changed"):
        write_checkpoint(tmp_path / "file" / "a.pth", {})


def test_written_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth", {})
    (tmp_path / "plain").write_text("")
    assert os.stat(tmp_path / "a.pth").st_mode == os.stat(tmp_path / "plain").st_mode


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"w": torch.randn(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"a\.pth is truncated or not a checkpoint: use an earlier one"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"root:x:0:0:root:/root:/bin/bash\n",
        b"daemon:x:1:1\n",
        b'{"a": 1}',
        b"\x80\x02.",
        b"\x80\x04",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"\xff\xd8\xff\xe0\x00\x10JFIF",
        b"PK\x03\x04",
        *(bytes([first]) * 40 for first in b"a(.qrsu0"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=NO_CHECKPOINT):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_checkpoint_cut_anywhere_is_named(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.randn(10)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 200)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=NO_CHECKPOINT):
            read_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*a\.pth: give the path of a \.pth"):
        read_checkpoint(tmp_path / "a.pth")


class _Touch:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("foreign", ["executing", "harmless"])
def test_foreign_classes_are_refused_and_never_executed(tmp_path: Path, foreign: str) -> None:
    trap = tmp_path / "trap"
    torch.save({"x": _Touch(trap) if foreign == "executing" else Path("a")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors, numbers, strings and containers"):
        read_checkpoint(tmp_path / "a.pth")
    assert not trap.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.filterwarnings("error")
def test_a_bare_pickle_of_foreign_classes_is_refused_alike(tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "a.pth").write_bytes(pickle.dumps(_Touch(trap), protocol))
    with pytest.raises(CheckpointError, match="holds more than tensors, numbers, strings and containers"):
        read_checkpoint(tmp_path / "a.pth")
    assert not trap.exists()
