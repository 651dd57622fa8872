"""Files that are complete or absent: written beside their place, flushed, then renamed into it."""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from superblock.errors import CheckpointError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the same folder, flush it to disk, rename it to ``path``.

    Raises:
        CheckpointError: the folder cannot be written or has no space left; ``path`` is as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # After writing: safetensors puts a file of its own there.
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError.
        raise CheckpointError(f"cannot write {path}: {_reason(error)}; nothing was changed") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise :class:`CheckpointError` where ``path`` plainly cannot be written: before long work, not after it."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if Path(path).is_dir():
        raise CheckpointError(f"cannot write {path}: it is a folder, give the name of a file")
    if not folder.is_dir():
        raise CheckpointError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"cannot write {path}: no permission to write in {folder}")


def read_checkpoint(path: str | Path) -> Any:
    """Read a ``torch.save`` file of tensors, numbers, strings and containers; nothing in it is executed.

    Besides those only ``argparse.Namespace``, in which training scripts keep their arguments, is let in.

    Raises:
        CheckpointError: the file is missing, truncated or holds other classes.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a .pth or .safetensors file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That the pickle's protocol is unusual: it loads or is refused.
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or _is_pickle(path):
            detail = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or "foreign classes"
            raise CheckpointError(
                f"{path} holds more than tensors, numbers, strings and containers and was not loaded ({detail}): "
                "save its state_dict instead"
            ) from error
        raise CheckpointError(f"{path} is truncated or not a checkpoint: use an earlier one") from error
    except Exception as error:  # What is no pickle ends the unpickler anywhere: IndexError, struct.error and others.
        raise CheckpointError(f"{path} is truncated or not a checkpoint: use an earlier one") from error


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """``torch.save``, atomically."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(1) != pickle.PROTO:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) == pickle.STOP


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0]
