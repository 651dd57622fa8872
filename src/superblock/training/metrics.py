"""The figures of every epoch: one JSON line each, and TensorBoard's events where asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superblock.errors import CheckpointError, ConfigError
from superblock.files import write_atomically

Record = dict[str, Any]


class MetricsFile:
    """``metrics.jsonl`` in the output folder, and the events beside it.

    Args:
        folder: the output folder.
        history: the epochs before a resumed one; what the file holds beyond them is dropped.
        tensorboard: write event files too.

    Raises:
        ConfigError: the tensorboard package is not installed.
        CheckpointError: the file cannot be written.
    """

    def __init__(self, folder: Path, history: Sequence[Record], tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self.events = _event_writer(folder) if tensorboard else None
        lines = "".join(json.dumps(record) + "\n" for record in history)
        write_atomically(self.path, lambda temporary: temporary.write_text(lines))

    def write(self, record: Record) -> None:
        """Add an epoch."""
        try:
            with self.path.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}; checkpoints are kept") from error
        if self.events is not None:
            for name, value in record.items():
                if name != "epoch" and value is not None:
                    self.events.add_scalar(name, value, record["epoch"])
            self.events.flush()


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard: pip install 'superblock[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder))
