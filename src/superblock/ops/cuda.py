"""The CUDA backend: the products of :mod:`superblock.ops.reference`, multiplied by Triton kernels.

Imported, and Triton with it, at the first product on a CUDA tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from superblock.errors import MatrixError
from superblock.ops import reference, tuning
from superblock.ops.triton import activation as activation_kernels
from superblock.ops.triton import decode, product, sampled
from superblock.ops.triton.configs import DENSE, Case, Config, product_configs, sampled_configs
from superblock.ops.triton.launch import Launch, rows_of
from superblock.ops.triton.plans import Operand, Plan, plan_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIDES = (16, 32, 64, 128)


def unsupported(dtype: torch.dtype, block_height: int, block_width: int) -> str | None:
    """Why a case goes to the reference: said by ``superblock info``."""
    if dtype not in DTYPES:
        return f"the Triton kernels multiply float16, bfloat16 and float32, not {dtype}"
    if block_height not in SIDES or block_width not in SIDES:
        return f"the Triton kernels take block sides of 16, 32, 64 and 128, not {block_height} × {block_width}"
    return None


def linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> Tensor:
    """``y = act(x Wᵀ + b) + residual``."""

    def dense() -> Tensor:
        return reference.linear(
            x, values, crow_indices, col_indices, bias, residual, out_features, in_features, activation
        )

    operand = _operand(values, crow_indices, col_indices, (out_features, in_features), transposed=False)
    result = _multiply("linear", x, operand, bias, residual, activation, False, dense)
    return dense() if result is None else result[0]


def linear_with_preactivation(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``(act(z), z)`` with ``z = x Wᵀ + b``, in one pass."""

    def dense() -> tuple[Tensor, Tensor]:
        return reference.linear_with_preactivation(
            x, values, crow_indices, col_indices, bias, out_features, in_features, activation
        )

    operand = _operand(values, crow_indices, col_indices, (out_features, in_features), transposed=False)
    result = _multiply("linear", x, operand, bias, None, activation, True, dense)
    if result is None:
        return dense()
    y, z = result
    assert z is not None
    return y, z


def grad_input(
    grad: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, out_features: int, in_features: int
) -> Tensor:
    """``dx = dy W``: the forward product through the transposed index, over the same values."""

    def dense() -> Tensor:
        return reference.grad_input(grad, values, crow_indices, col_indices, out_features, in_features)

    operand = _operand(values, crow_indices, col_indices, (out_features, in_features), transposed=True)
    result = _multiply("grad_input", grad, operand, None, None, "none", False, dense)
    return dense() if result is None else result[0]


def grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    block_height: int,
    block_width: int,
) -> Tensor:
    """``dW = dyᵀ x`` at the stored blocks."""

    def dense() -> Tensor:
        return reference.grad_values(
            grad, x, crow_indices, col_indices, out_features, in_features, block_height, block_width
        )

    shape, block = (out_features, in_features), (block_height, block_width)
    plan = _plan(crow_indices, col_indices, shape, block)
    out = x.new_empty(plan.nnz, *block)
    rows, grads = rows_of(x, in_features), rows_of(grad, out_features)
    if grads.shape[0] != rows.shape[0] or grads.dtype != rows.dtype:
        raise MatrixError(
            f"grad and x must have the same tokens and dtype, got {tuple(grad.shape)} of {grad.dtype} and "
            f"{tuple(x.shape)} of {x.dtype}"
        )

    def launches(config: Config) -> list[Launch]:
        return sampled.launches(grads, rows, out, plan, shape, config)

    with torch.cuda.device_of(x):
        case = Case("grad_values", rows, plan, shape, block)
        config = tuning.choose(case, sampled_configs, launches, dense)
        if config == DENSE:
            return dense()
        for launch in launches(config):
            launch.run()
    return out


def activation_gradient(grad: Tensor, z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``dz = dy · act'(z)`` and ``db``, its sum over the tokens, in one pass."""
    features = z.shape[-1]
    dz, dbias = torch.empty_like(z, memory_format=torch.contiguous_format), z.new_empty(features)
    flat_z, flat_dz = z.contiguous().view(-1, features), dz.view(-1, features)
    with torch.cuda.device_of(z):
        for launch in activation_kernels.launches(rows_of(grad, features), flat_z, flat_dz, dbias, activation):
            launch.run()
    return dz, dbias


def _multiply(
    op: str,
    x: Tensor,
    operand: Operand,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
    dense: Callable[[], object],
) -> tuple[Tensor, Tensor | None] | None:
    """``(y, z or None)``, or ``None`` where the dense product has been measured to be faster."""
    rows = rows_of(x, operand.in_features)
    y = x.new_empty(*x.shape[:-1], operand.out_features)
    z = torch.empty_like(y) if keep else None
    flat_y, flat_z = y.view(-1, operand.out_features), None if z is None else z.view(-1, operand.out_features)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows_of(residual, operand.out_features)

    def launches(config: Config) -> list[Launch]:
        engine = decode if config.engine == "decode" else product
        return engine.launches(rows, operand, flat_y, flat_z, bias, residual, activation, config)

    with torch.cuda.device_of(x):
        case = Case(op, rows, operand.plan, (operand.out_features, operand.in_features), operand.block)
        config = tuning.choose(case, product_configs, launches, dense)
        if config == DENSE:
            return None
        for launch in launches(config):
            launch.run()
    return y, z


def _operand(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int], transposed: bool) -> Operand:
    # TF32 tensor cores read operands along the sum only: blocks stored feature-major, as on the CPU, are turned first.
    turned = values.dtype == torch.float32 and not transposed
    if values.stride(2) != 1 and (turned or values.stride(1) != 1):
        values = values.contiguous()
    return Operand(values, _plan(crow, col, shape, (values.shape[1], values.shape[2])), shape, transposed)


def _plan(crow: Tensor, col: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Plan:
    rows, columns = math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])
    return plan_of(crow, col, col.shape[0], rows, columns)
