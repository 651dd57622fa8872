"""What the masks do while they are learned."""

from __future__ import annotations

from torch import Tensor, nn

from superblock.surgery import masked_weights, supermask_report


class MaskWatch:
    """Follows the masks of a model from epoch to epoch.

    Args:
        model: masked, or dense: then there is nothing to follow.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._masks()

    def figures(self) -> dict[str, float]:
        """Both sparsities, and the share of tiles that came to life or died since the last call."""
        now = self._masks()
        tiles = sum(mask.numel() for mask in now)
        changed = sum(int((old != new).sum()) for old, new in zip(self.before, now, strict=True))
        self.before = now
        report = supermask_report(self.model)
        return {
            "masked_sparsity": report.masked_sparsity if report.layers else 0.0,
            "model_sparsity": report.model_sparsity,
            "tiles_changed": changed / max(1, tiles),
        }

    def _masks(self) -> list[Tensor]:
        masks = {id(mask): mask for *_, mask in masked_weights(self.model)}
        return [mask.mask().clone() for mask in masks.values()]
