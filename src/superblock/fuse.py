"""Moves the activation after a block-sparse product into the product, where it costs no pass over memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from superblock.nn import BSRLinear


def fuse_activations(model: nn.Module) -> None:
    """Let every :class:`BSRLinear` apply the activation that follows it, in place; ``nn.Identity`` takes its place.

    Found in ``nn.Sequential``, in timm's ``Mlp`` and in ``nn.TransformerEncoderLayer``. A layer that is used in several
    places keeps its activation outside.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for module in list(model.modules()):
        for layer, name in _followed(module):
            activation = activation_name(getattr(module, name))
            if activation is not None and layer.activation == "none" and uses[id(layer)] == 1:
                layer.activation = activation
                setattr(module, name, nn.Identity())


def activation_name(activation: object) -> str | None:
    """The name under which a product applies an activation, or ``None`` where it cannot."""
    if isinstance(activation, nn.Module) and (activation._forward_hooks or activation._forward_pre_hooks):
        return None
    if type(activation) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    by_type = {nn.ReLU: "relu", nn.SiLU: "silu"}
    by_function = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
    return by_type.get(type(activation)) or (by_function.get(activation) if callable(activation) else None)  # type: ignore[arg-type,call-overload]


def _followed(module: nn.Module) -> Iterator[tuple[BSRLinear, str]]:
    """The block-sparse layers in a module whose result goes straight to one of the module's activations."""
    pairs: list[tuple[object, str]] = []
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        children = list(module._modules.items())
        pairs = [(first, name) for (_, first), (name, _) in pairwise(children)]
    elif isinstance(module, nn.TransformerEncoderLayer):
        pairs = [(module.linear1, "activation")]
    elif type(module).__name__ == "Mlp" and type(module).__module__.startswith("timm."):
        pairs = [(module.fc1, "act")]
    yield from ((layer, name) for layer, name in pairs if isinstance(layer, BSRLinear))
