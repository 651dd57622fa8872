"""What the ops say of arguments that do not fit, whoever calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_cases import needs_core
from torch import Tensor

import superblock.feed_forward
import superblock.self_attention  # noqa: F401  Both register their ops.
from superblock import BSRMatrix, bsr_linear
from superblock.errors import ConfigError, MatrixError
from superblock.ops.conv2d import bsr_conv2d

ops = torch.ops.superblock


def weight(out_features: int, in_features: int) -> dict[str, Tensor]:
    matrix = BSRMatrix.from_dense(torch.ones(out_features, in_features), 8)
    return {"values": matrix.values, "crow_indices": matrix.crow_indices, "col_indices": matrix.col_indices}


def indices_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "values"}


def numbered(number: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}{number}": tensor for name, tensor in tensors.items()}


def arguments(op: str) -> dict[str, Any]:
    """Arguments that the op takes, by name."""
    bare = weight(16, 32)
    full, sizes = {**bare, "bias": torch.ones(16)}, {"out_features": 16, "in_features": 32}
    x, z, grad = torch.ones(5, 32), torch.ones(5, 16), torch.ones(5, 16)
    indices, sides = indices_of(bare), {"block_height": 8, "block_width": 8}
    up, down = weight(24, 32), weight(16, 24)
    both = {
        **numbered(1, {**up, "bias": torch.ones(24)}),
        **numbered(2, {**down, "bias": torch.ones(16)}),
        "residual": torch.ones(5, 16),
    }
    chained = {"in_features": 32, "hidden_features": 24, "out_features": 16}
    norm = {"norm_weight": torch.ones(32), "norm_bias": torch.ones(32), "epsilon": 1e-5}
    heads = torch.ones(1, 2, 5, 8)
    images, kernel = torch.ones(1, 8, 6, 6), weight(8, 9 * 8)
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    convolved = torch.ones(1, 8, 4, 4)
    return {
        "bsr_linear": {"x": x, **full, "residual": z, **sizes, "activation": "relu"},
        "bsr_linear_with_preactivation": {"x": x, **full, **sizes, "activation": "relu"},
        "bsr_linear_normalized": {"x": x, **norm, **full, "residual": z, **sizes, "activation": "relu"},
        "bsr_grad_input": {"grad": grad, **bare, **sizes},
        "bsr_grad_values": {"grad": grad, "x": x, **indices, **sizes, **sides},
        "bsr_grad_values_activated": {"grad": grad, "z": x, **indices, **sizes, **sides, "activation": "relu"},
        "activation_gradient": {"grad": grad, "z": z, "activation": "relu"},
        "bias_gradient": {"grad": grad},
        "feed_forward": {"x": x, **both, **norm, **chained, "activation": "relu"},
        "feed_forward_with_preactivation": {"x": x, **both, **chained, "activation": "relu"},
        "feed_forward_gradient": {
            "grad": grad, "z": torch.ones(5, 24),
            **numbered(1, up),
            **numbered(2, down),
            **chained,
            "activation": "relu",
        },
        "attention": {"q": heads, "k": heads, "v": heads},
        "self_attention": {
            "x": torch.ones(1, 5, 32), **norm,
            **numbered(1, {**weight(48, 32), "bias": torch.ones(48)}),
            **numbered(2, {**weight(32, 16), "bias": torch.ones(32)}),
            "num_heads": 2, "inner_features": 16,
        },
        "bsr_conv2d": {
            "x": images, **kernel, "bias": torch.ones(8), "residual": convolved,
            "kernel_shape": (8, 8, 3, 3), **geometry, "activation": "relu",
        },
        "bsr_conv2d_grad_input": {
            "grad": convolved, **kernel, "kernel_shape": (8, 8, 3, 3), "size": (6, 6), **geometry,
        },
        "bsr_conv2d_grad_values": {
            "grad": convolved, "x": images, **indices_of(kernel),
            "kernel_shape": (8, 8, 3, 3), **geometry, **sides,
        },
    }[op]  # fmt: skip


def call(op: str, changes: dict[str, Any]) -> Any:
    return getattr(ops, op)(**{**arguments(op), **changes})


def names_of(op: str) -> list[str]:
    return [name for name, value in arguments(op).items() if isinstance(value, Tensor)]


OPS = [
    "bsr_linear", "bsr_linear_with_preactivation", "bsr_linear_normalized", "bsr_grad_input", "bsr_grad_values",
    "bsr_grad_values_activated", "activation_gradient", "bias_gradient", "feed_forward",
    "feed_forward_with_preactivation", "feed_forward_gradient", "attention", "self_attention", "bsr_conv2d",
    "bsr_conv2d_grad_input", "bsr_conv2d_grad_values",
]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_every_op_takes_tensors_of_one_device_alone(op: str) -> None:
    call(op, {})
    call(op, {name: arguments(op)[name].to("meta") for name in names_of(op)})
    for name in names_of(op) if len(names_of(op)) > 1 else ():
        with pytest.raises(MatrixError, match=f"{op} takes tensors of one device, got cpu and meta"):
            call(op, {name: arguments(op)[name].to("meta")})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arguments_that_mean_nothing_are_refused(op: str, device: str) -> None:
    known = arguments(op)
    told = {
        **{name: (torch.tensor(1.0), f"{name} must be of at least one dimension") for name in ("x", "grad", "z")},
        **{name: (torch.ones(16, 8), "values must be") for name in ("values", "values1", "values2")},
        "activation": ("tanh", "activation must be one of none, relu, gelu, gelu_tanh, silu, got 'tanh'"),
        "kernel_shape": (
            (8, 8, 3),
            r"kernel_shape must be \(out, channels / groups, height, width\), all at least 1, got",
        ),
        "stride": ((2**31, 1), "stride must be two numbers of at most"),
        "padding": ((0, 0, 0), "padding must be two numbers of at least 0"),
        "dilation": ((0, 1), "dilation must be two numbers of at least 1"),
        "epsilon": (None, "norm_weight and norm_bias take effect with an epsilon, got none"),
        "num_heads": (0, "num_heads must be at least 1"),
        **{name: (0, f"{name} must be at least 1, got 0") for name in ("groups", "block_height", "block_width")},
        **{name: (-8, f"{name} must be at least 1, got -8") for name in known if name.endswith("_features")},
    }
    if op == "bsr_linear_normalized":
        del told["epsilon"]  # Which its schema asks for.
    on = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in known.items()}
    for name in told.keys() & known.keys():
        bad, message = told[name]
        with pytest.raises((MatrixError, ConfigError), match=message):
            call(op, {**on, name: bad.to(device) if isinstance(bad, Tensor) else bad})
    for name in {"x", "grad", "z"} & known.keys():
        with pytest.raises(MatrixError, match=f"{name} must be of a floating dtype, got torch.int32"):
            call(op, {**on, name: on[name].int()})


@needs_core
def test_indices_and_values_of_other_dimensions_are_refused() -> None:
    for op in ("bsr_grad_values", "bsr_conv2d_grad_values"):
        with pytest.raises(MatrixError, match="col_indices must be 1 entries of int32 or int64"):
            call(op, {"col_indices": torch.tensor(0)})
    images, tensors = torch.ones(1, 8, 6, 6), {**weight(8, 72), "values": torch.ones(8, 8)}
    with torch.inference_mode(), pytest.raises(MatrixError, match=r"values must be \[nnz, bh, bw\] on cpu, got"):
        bsr_conv2d(images, **tensors, bias=None, residual=None, kernel_shape=(8, 8, 3, 3))


def test_attention_over_no_features_is_refused() -> None:
    empty = torch.ones(1, 2, 5, 0)
    with pytest.raises(MatrixError, match="d a multiple of 8"):
        ops.attention(empty, empty, empty)


@needs_core
@pytest.mark.parametrize("op", OPS)
def test_freed_tensors_are_not_read(op: str) -> None:
    for name in set(names_of(op)) & {"x", "grad", "z", "residual", "norm_weight", "norm_bias", "q", "k", "v"}:
        freed = arguments(op)[name].clone()
        freed.untyped_storage().resize_(0)
        with pytest.raises(MatrixError, match=r"expected tensors with data, got \(.*\) whose storage is empty"):
            call(op, {name: freed})


@needs_core
def test_freed_tensors_are_not_read_on_the_short_way() -> None:
    freed, images = torch.ones(5, 32), torch.ones(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    matrix, sizes = BSRMatrix(shape=(16, 32), **weight(16, 32)), (8, 8, 3, 3)
    for tensor in (freed, images):
        tensor.untyped_storage().resize_(0)
    with torch.inference_mode():
        with pytest.raises(MatrixError, match="whose storage is empty"):
            bsr_linear(freed, matrix)
        with pytest.raises(MatrixError, match="whose storage is empty"):
            bsr_conv2d(images, **weight(8, 72), bias=None, residual=None, kernel_shape=sizes)
