"""The CPU backend's convolutions: products of windows, which the native core gathers while it packs them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, get_num_threads

from superblock.errors import MatrixError
from superblock.ops import native
from superblock.ops.arguments import check, check_data, residual_rows
from superblock.ops.convolution import Geometry, KernelShape, Sides, channels_last, output_size, pair_of, row_length
from superblock.ops.native import pack_rows, pack_step
from superblock.ops.prepared import Prepared, prepare

Values = tuple[Tensor, Tensor, Tensor, Tensor | None]  # With their row and column indices, and the bias.


@dataclass(frozen=True, eq=False)
class Windows:
    """A convolution of images of one shape and layout that lacks only those."""

    run: Callable[[bytes], int]
    product: ctypes.Structure
    prepared: Prepared  # Whose indices and copies the product points to.
    size: tuple[int, int, int, int]  # Of the result.
    made_of: tuple[object, ...]


def conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_shape: KernelShape,
    stride: Sides = 1,
    padding: Sides = 0,
    dilation: Sides = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """``y = act(conv(x, W) + b + residual)`` over channels-last images, with no copy of their windows in memory.

    The arguments are those of :func:`superblock.ops.conv2d.bsr_conv2d`.
    """
    # As tuples, which nobody changes: the dispatcher hands lists on.
    sides = pair_of("stride", stride), pair_of("padding", padding), pair_of("dilation", dilation)
    geometry: Geometry = tuple(kernel_shape), *sides, groups
    x, windows = _images_and_windows(x, (values, crow_indices, col_indices, bias), geometry, activation)
    y = channels_last(windows.size, x)
    rows, _kept = _rows_of(x, y, residual, windows)
    if groups == 1:
        check(windows.run(pack_rows(*rows)))
    else:
        _run_groups(windows, rows, groups, y.element_size())
    return y


class Turns:
    """Convolutions of one group to run one after the other in one call, and the memory between them.

    Between two products Python comes from the outer caches again, because a product has just swept the inner ones.
    """

    def __init__(self) -> None:
        self._steps: list[bytes] = []
        self._alive: list[object] = []  # What the steps point to, the weights too: a layer may get others meanwhile.
        self._free: dict[tuple[int, ...], list[Tensor]] = {}  # Results that nothing reads any more, by their size.

    def add(self, x: Tensor, weight: Values, residual: Tensor | None, geometry: Geometry, activation: str) -> Tensor:
        """What will be ``act(conv(x, W) + b + residual)`` when all has run."""
        x, windows = _images_and_windows(x, weight, geometry, activation)
        free = self._free.get(windows.size)
        y = free.pop() if free else channels_last(windows.size, x)
        rows, kept = _rows_of(x, y, residual, windows)
        self._steps.append(pack_step(ctypes.addressof(windows.product), *rows))
        self._alive += x, y, kept, windows, weight
        return y

    def release(self, y: Tensor) -> None:
        """Let what is added from now on be written over this result."""
        self._free.setdefault(tuple(y.shape), []).append(y)

    def run(self) -> None:
        check(native.library().sb_run_in_turn(b"".join(self._steps), len(self._steps)))


def _images_and_windows(x: Tensor, weight: Values, geometry: Geometry, activation: str) -> tuple[Tensor, Windows]:
    """The images as the core reads them, and all of the convolution but those."""
    values, crow, col, bias = weight
    kernel_shape = geometry[0]
    shape = kernel_shape[0], row_length(kernel_shape, values.shape[-1])
    prepared = prepare(values, crow, col, bias, shape, activation)
    x = images_of(x)
    made_of = x.shape, x.stride(), x.dtype, x.device, *geometry
    windows: Windows | None = prepared.made.get("conv2d")
    if windows is None or windows.made_of != made_of:
        windows = _windows_of(prepared, x, geometry, made_of)
        prepared.made["conv2d"] = windows
    return x, windows


def images_of(x: Tensor) -> Tensor:
    """The images with their channels side by side, which is all that the core asks for."""
    if x.dim() != 4 or x.stride(1) == 1:
        return x
    check_data(x)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def window_of(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_size: Sequence[int],
    channels: int,
) -> ctypes.Structure:
    """Windows of so many channels over images in that order."""
    by_image, _, by_row, by_pixel = x.stride()
    return native.Window(
        *kernel, *stride, *padding, *dilation, *x.shape[2:], *out_size, by_image, by_row, by_pixel, channels
    )


def _windows_of(prepared: Prepared, x: Tensor, geometry: Geometry, made_of: tuple[object, ...]) -> Windows:
    """What every convolution of such images shares.

    Raises:
        MatrixError: the images do not fit the kernel.
    """
    (out_channels, channels, *kernel), stride, padding, dilation, groups = geometry
    block = prepared.product.weight.block_out
    if x.dim() != 4 or x.shape[1] != channels * groups:
        raise MatrixError(f"x must be [n, {channels * groups}, h, w], got {tuple(x.shape)}")
    if x.dtype != prepared.dtype or x.device.type != "cpu":
        raise MatrixError(f"x must be of {prepared.dtype} on cpu, got {x.dtype} on {x.device}")
    if groups != 1 and (groups < 1 or out_channels % groups or (out_channels // groups) % block):
        raise MatrixError(f"{out_channels} output channels in {groups} groups must divide into blocks of {block}")
    count, _, *size = x.shape
    out_size = output_size(size, kernel, stride, padding, dilation)
    if min(out_size) < 1:
        raise MatrixError(f"the window of {kernel[0]} × {kernel[1]} does not fit into images of {size[0]} × {size[1]}")
    product = native.Product.from_buffer_copy(prepared.product)
    product.tokens = count * math.prod(out_size)
    product.y_stride, product.residual_first = out_channels, True
    product.window = window_of(x, kernel, stride, padding, dilation, out_size, channels)
    by_image, _, by_row, by_pixel = x.stride()
    rows = by_row == size[1] * by_pixel and by_image == size[0] * by_row  # All pixels lie at one distance.
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0) and rows:
        product.window.kernel_h = 0  # Every pixel in turn: the plain product of its channels.
        product.x_stride = by_pixel
    run = partial(native.library().sb_run_rows, ctypes.byref(product))
    return Windows(run, product, prepared, (count, out_channels, *out_size), made_of)


def _rows_of(x: Tensor, y: Tensor, residual: Tensor | None, windows: Windows) -> tuple[tuple[int, ...], Tensor | None]:
    """The numbers of ``sb_rows``, and the residual that they point to."""
    whole, out_channels = windows.product, windows.size[1]
    added, added_stride = 0, out_channels
    if residual is not None:
        if residual.shape != y.shape:
            raise MatrixError(f"residual must be {tuple(y.shape)}, as the result is, got {tuple(residual.shape)}")
        if residual.stride() != y.stride() or residual.dtype != y.dtype or not residual.is_cpu:
            check_data(residual)
            residual = residual_rows(residual.movedim(1, -1), whole.tokens, out_channels, y.dtype)
            added_stride = residual.stride(0)
        added = residual.data_ptr()
    address = x.data_ptr()
    if not address or (residual is not None and not added):
        check_data(x, residual)
    return (address, added, y.data_ptr(), 0, whole.tokens, whole.x_stride, added_stride, get_num_threads(), 0), residual


def _run_groups(windows: Windows, rows: tuple[int, ...], groups: int, element_size: int) -> None:
    whole = native.Product.from_buffer_copy(windows.product)
    x, residual, y, _preactivation, _tokens, _x_stride, residual_stride, threads, _sequences = rows
    whole.x, whole.residual, whole.y, whole.residual_stride, whole.threads = x, residual, y, residual_stride, threads
    for group in range(groups if whole.tokens else 0):  # Of no images there are no addresses to move on.
        part = _group(whole, group, groups, element_size)
        check(native.library().sb_run_product(ctypes.byref(part)))


def _group(whole: ctypes.Structure, group: int, groups: int, size: int) -> ctypes.Structure:
    """One group's share of a convolution: its own block rows and channels, over the same memory."""
    part = native.Product.from_buffer_copy(whole)
    outputs = whole.weight.out_features // groups
    part.weight.out_features = outputs
    part.weight.crow += 4 * group * (outputs // whole.weight.block_out)
    part.x += group * whole.window.channels * size
    for name in ("y", "bias", "residual"):
        if getattr(part, name):
            setattr(part, name, getattr(part, name) + group * outputs * size)
    return part
