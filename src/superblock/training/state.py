"""The output folder: checkpoints that are complete or absent, and the newest of them to go on from."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superblock.errors import CheckpointError
from superblock.files import read_checkpoint, write_checkpoint

LATEST = "checkpoint.pth"
NUMBERED = re.compile(r"model_(\d+)\.pth")


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from, if any, and what the user should know of others."""

    path: str | None
    notices: tuple[str, ...] = ()


def prepare_folder(folder: Path, size: int) -> None:
    """Make the output folder, drop what a killed run left half-written, and make sure that a checkpoint fits.

    Args:
        folder: where checkpoints will go.
        size: how many bytes they will take.

    Raises:
        CheckpointError: no permission, or no space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.pth.*.tmp"):
            stale.unlink()
        with tempfile.TemporaryFile(dir=folder) as probe:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(probe.fileno(), 0, max(1, size))
    except OSError as error:
        raise CheckpointError(
            f"--output-dir {folder} cannot take checkpoints of {size / 2**20:.0f} MiB: {error.strerror}; "
            "training was not started"
        ) from error


def save_checkpoint(folder: Path, content: dict[str, Any], keep: int | None) -> None:
    """Write ``model_<epoch>.pth`` and ``checkpoint.pth``, then drop all but the ``keep`` newest of the former."""
    if keep != 0:
        write_checkpoint(folder / f"model_{content['epoch']}.pth", content)
    write_checkpoint(folder / LATEST, content)
    if keep is not None:
        ours = [path for number, path in _numbered(folder) if number <= content["epoch"]]
        for path in ours[keep:]:
            path.unlink(missing_ok=True)


def find_checkpoint(resume: str | None, output_dir: str | None) -> Found:
    """What ``--resume`` means: a file, the newest complete checkpoint of a folder, or (``auto``) of ``output_dir``.

    A folder without checkpoints is one whose run was stopped before its first: training starts from the beginning.

    Raises:
        CheckpointError: the path does not exist, or all checkpoints of the folder are truncated.
    """
    if resume is None:
        return Found(None)
    folder = Path(output_dir or ".") if resume == "auto" else Path(resume)
    if not folder.is_dir():
        if resume == "auto":
            return Found(None, (f"no checkpoint in {folder} yet: starting from the beginning",))
        return Found(resume)
    latest = folder / LATEST
    complete = _epoch_of(latest) if latest.is_file() else None
    broken = [latest] if latest.is_file() and complete is None else []
    chosen = latest if complete is not None else None
    for number, path in _numbered(folder):
        if complete is not None and (number <= complete or _older(path, latest)):
            continue  # One of a higher epoch but an earlier time is of another run.
        if _epoch_of(path) is not None:
            chosen = path
            break
        broken.append(path)
    notices = tuple(f"{path} is truncated: passed over" for path in broken)
    if chosen is None and broken:
        raise CheckpointError(f"every checkpoint in {folder} is truncated ({', '.join(map(str, broken))}): start anew")
    if chosen is None:
        return Found(None, (f"no checkpoint in {folder} yet: starting from the beginning",))
    return Found(str(chosen), notices)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """``model_<epoch>.pth``, newest first."""
    matches = [(NUMBERED.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted([(int(match[1]), path) for match, path in matches if match], reverse=True)


def _older(path: Path, other: Path) -> bool:
    return path.stat().st_mtime_ns < other.stat().st_mtime_ns


def _epoch_of(path: Path) -> int | None:
    """The epoch of a complete checkpoint, ``None`` for a truncated one."""
    try:
        content = read_checkpoint(path)
    except CheckpointError:
        return None
    return int(content.get("epoch", -1)) if isinstance(content, Mapping) else None
