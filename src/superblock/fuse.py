"""Moves the activation after a block-sparse product into the product, where it costs no pass over memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _all_modules

from superblock.nn import BSRConv2d, BSRLinear, FoldedBatchNorm
from superblock.ops.library import graded


def fuse_activations(model: nn.Module) -> None:
    """Let every block-sparse layer apply the activation that follows it, in place; ``nn.Identity`` takes its place.

    A layer that is used in several places, or heard by a hook, keeps its activation outside.
    """
    uses = count_uses(model)
    for module in list(model.modules()):
        for layer, name in _followed(module):
            activation = activation_name(getattr(module, name))
            alone = layer.activation == "none" and uses[id(layer)] == 1 and not watched(layer)
            if activation is not None and alone:
                layer.activation = activation
                setattr(module, name, nn.Identity())


def activation_name(activation: object) -> str | None:
    """The name under which a product applies an activation, or ``None`` where it cannot."""
    if isinstance(activation, nn.Module) and watched(activation):
        return None
    if type(activation) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    for timms, name in (("GELU", "gelu"), ("GELUTanh", "gelu_tanh")):
        if isinstance(activation, nn.Module) and comes_from(activation, "timm.", timms):
            return name
    by_type = {nn.ReLU: "relu", nn.SiLU: "silu"}
    by_function = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
    return by_type.get(type(activation)) or (by_function.get(activation) if callable(activation) else None)  # type: ignore[arg-type,call-overload]


def count_uses(model: nn.Module) -> Counter[int]:
    """In how many places of a model each module stands, by its id."""
    return Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


def watched(*modules: nn.Module) -> bool:
    """Whether a hook would notice that one of the modules is not called, or what was put in place of its own call."""
    if (
        _all_modules._global_forward_hooks
        or _all_modules._global_forward_pre_hooks
        or _all_modules._global_backward_hooks
        or _all_modules._global_backward_pre_hooks
    ):
        return True
    for module in modules:  # Asked between all products, where a generator takes three times as long.
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
            or "forward" in module.__dict__
        ):
            return True
    return False


# What a class defines that is of no use once it is converted: it has been built, and its file format is another.
_SPENT = frozenset(
    [
        "__init__",
        "__module__",
        "__doc__",
        "__annotations__",
        "__parameters__",
        "__static_attributes__",
        "__firstlineno__",
        "_version",
        "_load_from_state_dict",
    ]
)


def is_plain_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a module only calls its children in turn, of a class that another one can take the place of."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    own = type(module).__mro__[: type(module).__mro__.index(nn.Sequential)]
    return all(_SPENT.issuperset(vars(kind)) for kind in own)


def fusible(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether layers of these tensors can run as one on ``x``: on the CPU, in one dtype, no gradient asked for."""
    return alike(x, *tensors) and not graded(x, *tensors)


def alike(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether ``x`` and the others are on the CPU, in one dtype that autocast does not change, and without tangents."""
    if not x.is_cpu or torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0:
        return False
    dtype = x.dtype
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and tensor.dtype != dtype:
            return False
    return True


def comes_from(module: nn.Module, library: str, *names: str) -> bool:
    """Whether a module is one of a library's, by the names of its class and of the file that defines it."""
    return type(module).__module__.startswith(library) and type(module).__name__ in names


def steps(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of parts of a module of which the second takes what the first gives, and nothing else does."""
    for chain in _chains(module):
        names = [name for name in chain if not _stands_aside(getattr(module, name, None))]
        yield from pairwise(names)


def _followed(module: nn.Module) -> Iterator[tuple[BSRLinear | BSRConv2d, str]]:
    for first, second in steps(module):
        layer = getattr(module, first)
        if isinstance(layer, BSRLinear | BSRConv2d):
            yield layer, second


def _chains(module: nn.Module) -> list[list[str]]:
    """The parts that a module is known to run one after the other, by name."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return [list(module._modules)]
    if isinstance(module, nn.TransformerEncoderLayer):
        return [["linear1", "activation"]]
    if comes_from(module, "timm.layers.", "Mlp"):
        return [["fc1", "act"]]
    for library, activation in (("torchvision.models.resnet", "relu"), ("timm.models.resnet", "act1")):
        if comes_from(module, library, "ResNet"):
            return [["conv1", "bn1", activation]]
        if comes_from(module, library, "BasicBlock", "Bottleneck"):
            return [["conv1", "bn1"], ["conv2", "bn2"], ["conv3", "bn3"]]
    return []


def _stands_aside(part: object) -> bool:
    return part is None or (
        isinstance(part, nn.Module) and type(part) in (nn.Identity, FoldedBatchNorm) and not watched(part)
    )
