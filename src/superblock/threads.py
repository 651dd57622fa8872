"""How many CPU threads torch and the native core take."""

from __future__ import annotations

import os

import torch

from superblock.errors import ConfigError


def use_threads(count: int | None) -> None:
    """Take ``count`` threads from now on; with ``None`` as many as torch chose.

    Raises:
        ConfigError: see :func:`check_threads`.
    """
    check_threads(count)
    if count is not None:
        torch.set_num_threads(count)


def check_threads(count: int | None) -> None:
    """Raise :class:`ConfigError` unless the machine has a core for each thread.

    More only wait for each other, and very many, which torch takes without a word, end the process.
    """
    cores = os.cpu_count() or 1
    if count is not None and not 1 <= count <= cores:
        bound = "at least 1" if count < 1 else f"at most {cores}, the cores of this machine"
        raise ConfigError(f"--threads must be {bound}, got {count}")
