"""Which tiles of a weight live: one learned score a tile, thresholded, straight-through.

Supermask follows Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?" (CVPR 2020),
with one score for a tile of weights instead of one for a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from superblock.config import TileSparsity
from superblock.errors import ConfigError, ModelError
from superblock.whole import all_whole

Tile = tuple[int, ...]


def live_tiles(tiles: int, sparsity: float) -> int:
    """How many of ``tiles`` live at ``sparsity``: ``round((1 - sparsity) · tiles)``, at least one."""
    return max(1, round((1 - sparsity) * tiles))


def tile_of(shape: Sequence[int], tile_size: int) -> Tile:
    """The tile of a weight: square over outputs and inputs, whole over a convolution's kernel positions."""
    return (*(min(tile_size, side) for side in shape[:2]), *shape[2:])


def tile_grid(shape: Sequence[int], tile: Tile) -> Tile:
    """How many tiles, partial edge tiles included, cover each dimension of a weight."""
    return tuple(math.ceil(side / step) for side, step in zip(shape, tile, strict=True))


def threshold(scores: Tensor, live: int, keep_ties: bool = False) -> Tensor:
    """The boolean mask of the ``live`` highest scores, without leaving the device.

    Of equal scores at the threshold the lower index lives, so exactly ``live`` tiles do;
    with ``keep_ties`` all of them live, which is the original SuperBlock's rule.
    """
    flat = scores.detach().flatten()
    if keep_ties:
        lowest = flat.float().kthvalue(flat.numel() - live + 1).values
        return scores.detach().float() >= lowest
    kernels = _kernels(flat)
    if kernels is not None and kernels.ranks(flat):
        mask: Tensor = kernels.threshold(scores.detach(), live)
        return mask
    order = flat.argsort(descending=True, stable=True)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, order[:live], True).view(scores.shape)


def mask_tiles(weight: Tensor, mask: Tensor, tile: Tile) -> Tensor:
    """``weight`` with every tile multiplied by its entry of ``mask``.

    The mask is spread over all dimensions but the first, then applied to rows of tiles,
    so that nothing of the weight's size is built but the result.
    """
    for dim, (side, step) in enumerate(zip(weight.shape, tile, strict=True)):
        if dim and step < side:
            mask = mask.repeat_interleave(step, dim).narrow(dim, 0, side)
    rows, height = weight.shape[0], tile[0]
    whole = rows // height
    body = (weight[: whole * height].unflatten(0, (whole, height)) * mask[:whole, None]).flatten(0, 1)
    return body if whole * height == rows else torch.cat([body, weight[whole * height :] * mask[whole:]])


def tile_sums(x: Tensor, tile: Tile) -> Tensor:
    """The sum of ``x`` over each tile, shaped as the tile grid, accumulated in float32 or wider."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    for dim, step in enumerate(tile):
        whole = x.shape[dim] // step
        sums = x.narrow(dim, 0, whole * step).unflatten(dim, (whole, step)).sum(dim + 1, dtype=accumulate)
        rest = x.shape[dim] - whole * step
        if rest:
            tail = x.narrow(dim, whole * step, rest).sum(dim, keepdim=True, dtype=accumulate)
            sums = torch.cat([sums, tail], dim)
        x = sums
    return x


def tile_sizes(shape: Sequence[int], tile: Tile, device: torch.device | None = None) -> Tensor:
    """How many weights each tile holds, ``[*grid]``: fewer at the edges."""
    sizes = torch.ones((), dtype=torch.int64, device=device)
    for side, step in zip(shape, tile, strict=True):
        sizes = sizes[..., None] * torch.arange(side, 0, -step, device=device).clamp_max(step)
    return sizes


@torch.no_grad()
def tile_magnitudes(weight: Tensor, tile: Tile) -> Tensor:
    """The root mean square of each tile's weights over that of the whole weight, shaped as the tile grid."""
    square = weight.detach().float().square()
    mean_square = tile_sums(square, tile) / tile_sizes(weight.shape, tile, weight.device)
    overall = square.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (mean_square / overall).sqrt().to(weight.dtype)


def _kernels(tensor: Tensor) -> Any:
    """The fused kernels, for a CUDA tensor; a compiled graph fuses by itself, and without Triton torch does it all."""
    return _fused() if tensor.is_cuda and not torch.compiler.is_compiling() else None


@lru_cache(maxsize=1)
def _fused() -> Any:
    if find_spec("triton") is None:
        return None
    from superblock.ops.triton import masks

    return masks


class _StraightThrough(torch.autograd.Function):
    """``weight ⊙ mask``, whose gradient reaches the scores as if the threshold were the identity.

    ``d weight = mask ⊙ d out``, ``d scores = Σ over the tile of d out ⊙ weight``, dead tiles included.
    """

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, mask: Tensor, tile: Tile) -> Tensor:
        kernels = _kernels(weight)
        if kernels is not None and kernels.takes(weight, tile):
            masked: Tensor = kernels.mask_tiles(weight, mask, tile)
            return masked
        return mask_tiles(weight, mask, tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tile], output: Tensor) -> None:
        weight, scores, mask, ctx.tile = inputs
        ctx.scores_dtype = scores.dtype
        ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, mask = ctx.saved_tensors
        kernels = None if torch.is_grad_enabled() else _kernels(weight)
        if kernels is not None and kernels.takes(weight, ctx.tile) and grad.dtype == weight.dtype:
            grad_weight, grad_scores = kernels.mask_gradients(grad, weight, mask, ctx.tile)
            return grad_weight, grad_scores.to(ctx.scores_dtype), None, None
        grad_weight = mask_tiles(grad, mask, ctx.tile) if ctx.needs_input_grad[0] else None
        grad_scores = tile_sums(grad * weight, ctx.tile).to(ctx.scores_dtype) if ctx.needs_input_grad[1] else None
        return grad_weight, grad_scores, None, None


def _check(weight: Tensor, target: TileSparsity, tile: Tile | None) -> None:
    if weight.dim() == 0 or weight.numel() == 0 or not weight.is_floating_point():
        raise ModelError(
            f"a mask needs a weight of floating point, of one dimension or more and not empty, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if not isinstance(target, TileSparsity):
        raise ConfigError(f"the target must be a TileSparsity(sparsity, tile_size), got {target!r}")
    if tile is not None and all_whole(tile, weight.dim()) is None:
        raise ConfigError(f"a tile of this weight is {weight.dim()} whole numbers of at least 1, got {tile!r}")


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


class Supermask(nn.Module):
    """A parametrization that zeroes all tiles of a weight but those with the highest scores.

    ``w ↦ w ⊙ spread(scores ≥ threshold)``; ``scores`` has one entry a tile, shaped as the tile grid, and starts at
    the root mean square of the tile's weights over that of the whole weight, so that a trained weight begins with
    its largest tiles.

    Args:
        weight: the dense weight, of any rank: ``[out, in, *kernel]``.
        target: the sparsity and the tile's side.
        tile: the tile's extent in every dimension, where it is not square over outputs and inputs.
        keep_ties: let every tile live that ties with the threshold.

    Raises:
        ModelError: a weight that is empty, a single number or not of floating point, or, when called, of another shape.
        ConfigError: a target that is no :class:`TileSparsity`, or a tile that does not fit the weight's rank.
    """

    def __init__(
        self, weight: Tensor, target: TileSparsity, *, tile: Tile | None = None, keep_ties: bool = False
    ) -> None:
        super().__init__()
        _check(weight, target, tile)
        self.shape = tuple(weight.shape)
        self.target = target
        self.tile = tile or tile_of(weight.shape, target.tile_size)
        self.grid = tile_grid(weight.shape, self.tile)
        self.live = live_tiles(math.prod(self.grid), target.sparsity)
        self.keep_ties = keep_ties
        self.scores = nn.Parameter(tile_magnitudes(weight, self.tile))
        self._cache: tuple[Any, ...] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if weight.shape != self.shape:
            raise ModelError(f"the mask is of a weight of {_times(self.shape)}, got one of {_times(weight.shape)}")
        return _StraightThrough.apply(weight, self.scores, self.mask().to(weight.dtype), self.tile)

    def mask(self) -> Tensor:
        """Which tiles live, ``[*grid]`` bool: computed again only when the scores have changed."""
        scores = self.scores
        if torch.compiler.is_compiling() or scores.is_inference():
            return threshold(scores, self.live, self.keep_ties)
        key = (scores._version, scores.data_ptr(), scores.device, scores.dtype, self.live, self.keep_ties)
        if self._cache is None or self._cache[0] is not scores or self._cache[1] != key:
            # A tensor made inside inference_mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = (scores, key, threshold(scores, self.live, self.keep_ties))
        return self._cache[2]

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without the cache: its scores count their versions from zero again."""
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        return f"tile={self.tile}, grid={self.grid}, live={self.live}/{math.prod(self.grid)}"
