"""BSR layers do what the dense layers with the same weight do."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from test_bsr import blocky
from torch import nn

from superblock import BSRConv2d, BSRLinear, BSRMatrix, BSRMultiheadAttention
from superblock.convert import padding_of
from superblock.errors import MatrixError, ModelError
from superblock.ops import indices
from superblock.ops.convolution import matrix_of


def linear_pair(out_features: int = 50, in_features: int = 24) -> tuple[nn.Linear, BSRLinear]:
    dense = nn.Linear(in_features, out_features)
    dense.weight.data = blocky((out_features, in_features), 8)
    return dense, BSRLinear(BSRMatrix.from_dense(dense.weight, 8), dense.bias)


def test_linear_forward_and_backward() -> None:
    dense, sparse = linear_pair()
    x = torch.randn(2, 5, 24)
    (y, expected) = (sparse(x), dense(x))
    torch.testing.assert_close(y, expected)
    expected.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    grad = BSRMatrix(sparse.crow_indices, sparse.col_indices, sparse.values.grad, (50, 24)).to_dense()
    torch.testing.assert_close(grad, dense.weight.grad * (dense.weight != 0))


def test_a_layer_built_in_inference_mode_checks_its_indices_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        dense, sparse = linear_pair()
        x = torch.randn(3, 24)
        torch.testing.assert_close(sparse(x), dense(x))
        monkeypatch.setattr(indices, "check_indices", lambda *_: pytest.fail("checked again"))
        torch.testing.assert_close(sparse(x), dense(x))


def test_a_weight_read_by_f_linear_is_multiplied_and_any_other_reader_is_told() -> None:
    dense, sparse = linear_pair()
    x = torch.randn(3, 24)
    torch.testing.assert_close(nn.functional.linear(x, sparse.weight, sparse.bias), dense(x))
    assert sparse.weight.dtype == torch.float32
    with pytest.raises(ModelError, match=r"can only be read by F\.linear, not by matmul: exclude its layer"):
        torch.matmul(x, sparse.weight)
    with pytest.raises(ModelError, match=r"can only be read by F\.linear, not by mean: exclude its layer"):
        sparse.weight.mean()
    assert sparse.weight.shape == dense.weight.shape
    assert copy.copy(sparse.weight).shape == dense.weight.shape


def test_a_convolutions_weight_tells_its_shape_and_device_and_no_more() -> None:
    dense = nn.Conv2d(8, 16, 3)
    sparse, x = sparse_convolution(dense, 8), torch.randn(1, 8, 5, 5)
    assert (sparse.weight.shape, sparse.weight.device) == (dense.weight.shape, dense.weight.device)
    for asked in ("dim", "size", "numel"):
        assert getattr(sparse.weight, asked)() == getattr(dense.weight, asked)()
    assert (sparse.weight.ndim, sparse.weight.size(0), sparse.weight.dtype) == (4, dense.weight.size(0), torch.float32)
    assert not hasattr(sparse.weight, "mT")
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(sparse, name) == getattr(dense, name)
    for reader in (nn.functional.conv2d, nn.functional.linear):
        message = f"the weight of a block-sparse convolution cannot be read by {reader.__name__}: exclude its layer"
        with pytest.raises(ModelError, match=message):
            reader(x, sparse.weight)


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
@pytest.mark.parametrize(("padding", "padding_mode"), [(0, "zeros"), (1, "zeros"), ((2, 1), "reflect")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolution(
    stride: int | tuple[int, int], padding: int | tuple[int, int], padding_mode: str, memory_format: torch.memory_format
) -> None:
    dense = nn.Conv2d(12, 20, 1, stride=stride, padding=padding, padding_mode=padding_mode)
    dense.weight.data = blocky((20, 12), 8).view(20, 12, 1, 1)
    matrix = BSRMatrix.from_dense(dense.weight.flatten(1), 8)
    sparse = BSRConv2d(matrix, dense.bias, dense.stride, dense.padding, padding_mode)
    x = torch.randn(2, 12, 7, 9).to(memory_format=memory_format)
    torch.testing.assert_close(sparse(x), dense(x))
    assert sparse(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sparse(x[0]), dense(x[0]))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "same", "kernel_size": (2, 4)},
        {"padding": "valid"},
        {"padding": (1, 2), "padding_mode": "circular"},
        {"padding": "same", "kernel_size": (4, 3), "padding_mode": "reflect"},
        {"padding": 2, "groups": 2, "bias": False},
    ],
    ids=str,
)
def test_convolution(options: dict[str, Any]) -> None:
    dense = nn.Conv2d(32, 48, **{"kernel_size": 3, **options})
    dense.weight.data *= (
        (torch.rand(6, 4 // dense.groups) < 0.4).repeat_interleave(8, 0).repeat_interleave(8, 1)[:, :, None, None]
    )
    sparse = sparse_convolution(dense, 8)
    for x in (torch.randn(2, 32, 7, 9), torch.randn(32, 7, 9)):
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)
    assert sparse(torch.randn(2, 32, 7, 9)).is_contiguous(memory_format=torch.channels_last)
    for layer in (sparse, dense):
        x = torch.linspace(-1, 1, 2 * 32 * 7 * 9).view(2, 32, 7, 9).requires_grad_()
        layer(x).square().sum().backward()
        layer.seen = x.grad
    torch.testing.assert_close(sparse.seen, dense.seen, rtol=1e-3, atol=1e-4)
    grad = sparse.dense(sparse.values.grad)
    torch.testing.assert_close(grad, dense.weight.grad * (dense.weight != 0), rtol=1e-3, atol=1e-3)


def test_a_convolution_takes_its_geometry_as_torch_does() -> None:
    dense = nn.Conv2d(16, 24, 3, 2, 1, 2)
    layer = BSRConv2d(matrix_of(dense.weight, 8), dense.bias, 2, 1, "zeros", tuple(dense.weight.shape), 2)
    assert (layer.stride, layer.padding, layer.dilation) == (dense.stride, dense.padding, dense.dilation)
    x = torch.randn(2, 16, 9, 8)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


def test_a_convolution_tells_its_shape_and_survives_copies() -> None:
    dense = nn.Conv2d(16, 24, (3, 5), stride=2, padding=1)
    layer = sparse_convolution(dense, 8)
    told = "16, 24, kernel_size=(3, 5), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1, bias=True"
    assert repr(layer) == f"BSRConv2d({told}, blocksize=(8, 8), nnz=90)"
    torch.testing.assert_close(layer.dense(), dense.weight)
    assert layer.weight_shape == (24, 16, 3, 5)
    x = torch.randn(1, 16, 9, 9)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x))
    twin.values.data.zero_()
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(x), layer(x))


def test_a_convolution_exports() -> None:
    layer = sparse_convolution(nn.Conv2d(16, 24, 3, padding="same"), 8)
    exported = torch.export.export(
        layer, (torch.randn(2, 16, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
    )
    x = torch.randn(5, 16, 8, 8)
    torch.testing.assert_close(exported.module()(x), layer(x))


def sparse_convolution(dense: nn.Conv2d, block: int) -> BSRConv2d:
    """As conversion makes it, whatever the blocks hold."""
    return BSRConv2d(
        matrix_of(dense.weight, block),
        dense.bias,
        dense.stride,
        padding_of(dense),
        dense.padding_mode,
        tuple(dense.weight.shape),
        dense.dilation,
        dense.groups,
    )


def attention_pair(batch_first: bool) -> tuple[nn.MultiheadAttention, BSRMultiheadAttention]:
    dense = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    dense.in_proj_weight.data = blocky((48, 16), 8)
    dense.out_proj.weight.data = blocky((16, 16), 8)
    nn.init.normal_(dense.in_proj_bias)
    in_proj = BSRLinear(BSRMatrix.from_dense(dense.in_proj_weight, 8), dense.in_proj_bias)
    out_proj = BSRLinear(BSRMatrix.from_dense(dense.out_proj.weight, 8), dense.out_proj.bias)
    return dense.eval(), BSRMultiheadAttention(in_proj, out_proj, 4, batch_first=batch_first).eval()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("inputs", ["self", "cross", "all", "unbatched"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention(batch_first: bool, inputs: str, need_weights: bool) -> None:
    dense, sparse = attention_pair(batch_first)
    query, key, value = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    arguments = {
        "self": (query, query, query),
        "cross": (query, key, key),
        "all": (query, key, value),
        "unbatched": (query[0], key[0], value[0]),
    }[inputs]
    for average in (True, False):
        expected = dense(*arguments, need_weights=need_weights, average_attn_weights=average)
        got = sparse(*arguments, need_weights=need_weights, average_attn_weights=average)
        torch.testing.assert_close(got[0], expected[0])
        assert (got[1] is None) == (expected[1] is None)
        if need_weights:
            torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", ["bool", "float", "per head", "padding", "both"])
def test_attention_masks(mask: str, need_weights: bool) -> None:
    dense, sparse = attention_pair(True)
    x = torch.randn(3, 5, 16)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    options = {
        "bool": {"attn_mask": later},
        "float": {"attn_mask": torch.randn(5, 5)},
        "per head": {"attn_mask": torch.randn(12, 5, 5)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": later, "key_padding_mask": padding},
    }[mask]
    expected = dense(x, x, x, need_weights=need_weights, **options)
    torch.testing.assert_close(sparse(x, x, x, need_weights=need_weights, **options)[0], expected[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"is_causal": True},
            ModelError,
            "is_causal only says what attn_mask holds, and there is none: pass attn_mask",
        ),
        ({"attn_mask": torch.ones(5, 5).int()}, MatrixError, "attn_mask must be of torch.bool or, .* got torch.int32"),
        ({"attn_mask": torch.ones(5, 5).double()}, MatrixError, "of torch.float32, got torch.float64"),
        ({"attn_mask": torch.zeros(5, 4)}, MatrixError, r"attn_mask must be \(5, 5\) or \(12, 5, 5\), got \(5, 4\)"),
        ({"attn_mask": torch.zeros(1, 1, 5, 5)}, MatrixError, r"attn_mask must be .* got \(1, 1, 5, 5\)"),
        ({"key_padding_mask": torch.zeros(3, 5).long()}, MatrixError, "key_padding_mask must be of torch.bool or"),
        ({"key_padding_mask": torch.zeros(1, 5)}, MatrixError, r"key_padding_mask must be \(3, 5\), got \(1, 5\)"),
        ({"key": torch.randn(1, 5, 16), "value": torch.randn(1, 5, 16)}, MatrixError, "must have the batch of query"),
        ({"value": torch.randn(3, 4, 16)}, MatrixError, "as many tokens each, got"),
        ({"key": torch.randn(5, 16)}, MatrixError, "must have 3 dimensions, or 2 without a batch, got 3, 2 and 3"),
        ({"query": torch.randn(16)}, MatrixError, "must have 3 dimensions, or 2 without a batch, got 1, 3 and 3"),
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_refuses_what_the_original_does(
    changes: dict[str, Any], error: type[Exception], message: str, batch_first: bool
) -> None:
    dense, sparse = attention_pair(batch_first)
    arguments = {name: torch.randn(3, 5, 16) for name in ("query", "key", "value")} | changes
    if not batch_first:
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name].transpose(0, 1) if arguments[name].dim() == 3 else arguments[name]
    with pytest.raises(error, match=message):
        sparse(**arguments)
    with pytest.raises((RuntimeError, AssertionError)):
        dense(**arguments)


def test_attention_takes_masks_of_float32_under_autocast() -> None:
    dense, sparse = attention_pair(True)
    x, mask = torch.randn(3, 5, 16), torch.randn(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = sparse(x, x, x, attn_mask=mask, need_weights=False)[0]
        torch.testing.assert_close(got, dense(x, x, x, attn_mask=mask, need_weights=False)[0], rtol=0.05, atol=0.05)


def test_one_product_serves_all_that_is_projected_from_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    _, sparse = attention_pair(True)
    calls: list[int] = []
    sparse.in_proj.register_forward_hook(lambda *_: calls.append(1))
    x, memory = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    sparse(x, x, x)
    assert len(calls) == 1
    sparse(x, memory, memory)
    assert len(calls) == 3


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict"])
def test_copies_are_plain_bsr(copied: str) -> None:
    _, layer = linear_pair()
    x = torch.randn(3, 24)
    if copied == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copied == "pickle":
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    else:
        _, twin = linear_pair()
        twin.values = nn.Parameter(torch.zeros_like(layer.values))
        twin.crow_indices, twin.col_indices = torch.zeros_like(layer.crow_indices), torch.zeros_like(layer.col_indices)
        twin.load_state_dict(layer.state_dict())
    assert set(twin.state_dict()) == {"values", "bias", "crow_indices", "col_indices"}
    torch.testing.assert_close(twin(x), layer(x))


def test_an_optimizer_step_changes_the_product() -> None:
    _, layer = linear_pair()
    x = torch.randn(3, 24)
    before = layer(x).detach()
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    expected = nn.functional.linear(x, layer.matrix.to_dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), before)


def test_layers_export() -> None:
    _, layer = linear_pair()
    x = torch.randn(3, 24)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    y = torch.randn(7, 24)
    torch.testing.assert_close(exported.module()(y), layer(y))


def test_wrong_input_is_told() -> None:
    _, layer = linear_pair()
    with pytest.raises(MatrixError, match=r"x must be \[..., 24\]"):
        layer(torch.randn(3, 25))


@pytest.mark.parametrize("blocksize", [16, 5])
def test_autograd_takes_the_gradient_of_the_values_as_it_lies(blocksize: int) -> None:
    layer = BSRLinear(BSRMatrix.from_dense(torch.randn(32, 48), blocksize))
    made: list[int] = []
    layer.values.register_hook(lambda gradient: made.append(gradient.data_ptr()))
    layer(torch.randn(4, 48)).sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.stride() == layer.values.stride()
    assert made == [layer.values.grad.data_ptr()]
