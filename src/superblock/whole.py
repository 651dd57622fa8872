"""What counts as a whole number in an argument."""

from __future__ import annotations

import operator
from typing import Any


def whole(value: Any) -> int | None:
    """``value`` as an ``int``, or ``None`` where it is no whole number, as ``16.0``, ``"16"`` and ``True`` are not."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def all_whole(values: Any, count: int, least: int = 1) -> tuple[int, ...] | None:
    """``count`` whole numbers of at least ``least``, or ``None`` where ``values`` are not."""
    if isinstance(values, str):
        return None
    try:
        numbers = [whole(value) for value in values]
    except TypeError:
        return None
    found = tuple(number for number in numbers if number is not None and number >= least)
    return found if len(found) == len(numbers) == count else None
