"""How the values of a weight lie in memory; every product takes any layout, and each is fastest on one."""

from __future__ import annotations

from torch import Tensor


def feature_major(values: Tensor) -> Tensor:
    """The same values, indexed alike, with a block's outputs side by side: strides ``(bh · bw, 1, bh)``.

    The native core multiplies them where they lie, so that a converted model needs no second, packed copy. Copies by
    ``deepcopy``, ``to`` and ``load_state_dict`` keep the layout.
    """
    return values.transpose(1, 2).contiguous().transpose(1, 2)
