"""The installed version."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed


def version() -> str:
    """The installed distribution's version, or ``0+source`` when run from a bare checkout."""
    try:
        return installed("superblock")
    except PackageNotFoundError:
        return "0+source"
