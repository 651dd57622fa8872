"""Layer norms that run in the product after them, in inference on the CPU: no pass over memory of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from superblock.fuse import comes_from, fusible, watched
from superblock.nn import BSRLinear, Norm


def norm_of(norm: nn.Module, x: Tensor, layer: object) -> Norm | None:
    """What ``layer``'s product needs to normalize ``x`` itself, or ``None`` where ``norm`` must be called.

    That is a plain ``nn.LayerNorm`` (torch's or timm's) over the last dimension, in the dtype of ``x``, seen by nobody,
    where no gradient is asked for.
    """
    plain = type(norm) is nn.LayerNorm or comes_from(norm, "timm.", "LayerNorm")
    if not plain or type(layer) is not BSRLinear or watched(norm, layer):
        return None
    assert isinstance(norm, nn.LayerNorm)
    parameters: dict[str, Any] = norm._parameters
    try:  # Past nn.Module.__getattr__, as everywhere between products.
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # Replaced by plain tensors.
        weight, bias = norm.weight, norm.bias
    values, _, _, layer_bias = layer.tensors
    fits = tuple(norm.normalized_shape) == x.shape[-1:] and fusible(x, weight, bias, values, layer_bias)
    return (weight, bias, norm.eps) if fits else None
