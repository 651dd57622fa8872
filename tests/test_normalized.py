"""Layer norms in the product after them: the same result, and only where nobody could tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_cases import DTYPES, assert_near, isa, needs_core, random_weight
from test_residual import LINEAR, TOKENS, converted, encoder_block, torch_layer
from torch import nn

import superblock as sb
from superblock.errors import MatrixError
from superblock.nn import BSRLinear
from superblock.normalized import norm_of
from superblock.ops import cpu, reference

timm = pytest.importorskip("timm", reason="needs the vision extra")
pytestmark = needs_core
native = pytest.mark.usefixtures("nan_filled", isa.__name__)

EPSILON = 1e-5
# (tokens, in, out, block): less than a vector, odd sizes, whole vectors; few tokens and several groups.
CASES = [
    (1, 8, 16, (8, 8)),
    (5, 91, 40, (8, 16)),
    (70, 64, 64, (16, 16)),
    (131, 200, 96, (32, 8)),
    (0, 64, 64, (16, 16)),
]


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "in_", "out", "block"), CASES)
def test_products_of_normalized_tokens_match_the_reference(tokens, in_, out, block, dtype) -> None:
    first = (*random_weight(out, in_, block, dtype), torch.randn(out).to(dtype))
    x, residual = (2 * torch.randn(tokens, in_) + 1).to(dtype), torch.randn(tokens, out).to(dtype)
    x[:1] = 3  # No variance at all.
    for weight, bias in ((torch.randn(in_).to(dtype), torch.randn(in_).to(dtype)), (None, None)):
        y = cpu.linear_normalized(x, (weight, bias, EPSILON), *first, residual, out, in_, "relu")
        wide = [None if tensor is None else tensor.double() for tensor in (weight, bias)]
        normalized = F.layer_norm(x.double(), (in_,), *wide, EPSILON).to(dtype)
        values, crow, col, added = first
        assert_near(
            y,
            reference.linear(
                normalized.double(), values.double(), crow, col, added.double(), residual.double(), out, in_, "relu"
            ),
        )


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 150])
def test_a_feed_forward_of_normalized_tokens_is_two_products(tokens: int, dtype: torch.dtype) -> None:
    first = (*random_weight(64, 40, (16, 8), dtype), torch.randn(64).to(dtype), 64, 40)
    second = (*random_weight(40, 64, (8, 16), dtype), torch.randn(40).to(dtype), 40, 64)
    x, norm = (
        torch.randn(tokens, 2, 40)[:, 1].to(dtype),
        (torch.randn(40).to(dtype), torch.randn(40).to(dtype), EPSILON),
    )
    y = cpu.feed_forward(x, first, "gelu", second, x, norm)
    assert_near(y, cpu.feed_forward(F.layer_norm(x, (40,), *norm), first, "gelu", second, x).double())


def test_norms_that_do_not_fit_are_refused() -> None:
    weight = random_weight(32, 16, (8, 8))
    for norm, message in (
        ((torch.ones(15), None, EPSILON), r"the norm's weight must be \[16\] of torch\.float32 on cpu, got \(15,\)"),
        (
            (None, torch.ones(16).half(), EPSILON),
            r"the norm's bias must be \[16\] of torch\.float32 on cpu, got \(16,\) of torch\.float16",
        ),
    ):
        with pytest.raises(MatrixError, match=message):
            cpu.linear_normalized(torch.zeros(2, 16), norm, *weight, None, None, 32, 16, "none")


@pytest.mark.parametrize(
    "build",
    [encoder_block, lambda: torch_layer(norm_first=True), lambda: timm.models.vision_transformer.Block(16, 2)],
    ids=["torchvision", "torch", "timm"],
)
def test_blocks_call_their_norms_only_where_gradients_are_asked_for(build, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, model = converted(build)
    with torch.no_grad():
        expected = twin(TOKENS)
    calls: list[object] = []
    original = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda *args, **options: calls.append(1) or original(*args, **options))
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert not calls
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_only_plain_norms_of_the_same_dtype_run_in_the_product() -> None:
    class LayerNorm(nn.LayerNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(16, 16))
    sb.apply_supermask(model, LINEAR)
    sb.sparsify_weights(model)
    sb.to_bsr(model)
    layer, x = model[0], torch.randn(3, 16)
    watched = nn.LayerNorm(16)
    watched.register_forward_hook(lambda *_: None)
    assert type(layer) is BSRLinear
    with torch.inference_mode():
        assert norm_of(nn.LayerNorm(16), x, layer) is not None
        assert norm_of(nn.LayerNorm(16, elementwise_affine=False), x, layer) == (None, None, 1e-5)
        for norm in (LayerNorm(16), watched, nn.LayerNorm((3, 16)), nn.LayerNorm(16).bfloat16(), nn.RMSNorm(16)):
            assert norm_of(norm, x, layer) is None
        assert norm_of(nn.LayerNorm(16), x, nn.Linear(16, 16)) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert norm_of(nn.LayerNorm(16), x, layer) is None
    assert norm_of(nn.LayerNorm(16), x, layer) is None  # Gradients.


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_replaced_by_a_plain_tensor_is_still_read(name: str) -> None:
    values, crow, col = random_weight(16, 16, (16, 16), density=1.0)
    layer, norm = BSRLinear(sb.BSRMatrix(crow, col, values, (16, 16))), nn.LayerNorm(16)
    plain = torch.randn(16)
    delattr(norm, name)
    setattr(norm, name, plain)
    with torch.no_grad():
        inside = norm_of(norm, torch.randn(3, 16), layer)
    assert inside is not None
    assert any(tensor is plain for tensor in inside[:2])
    plain.requires_grad_()
    layer.requires_grad_(False)
    assert norm_of(norm.requires_grad_(False), torch.randn(3, 16), layer) is None


def test_the_op_is_well_formed() -> None:
    values, crow, col = random_weight(32, 16, (8, 8))
    arguments = (torch.randn(3, 16), torch.ones(16), None, EPSILON, values, crow, col, None, None, 32, 16, "relu")
    torch.library.opcheck(torch.ops.superblock.bsr_linear_normalized.default, arguments)


def test_blocks_the_core_does_not_take_are_normalized_first() -> None:
    values, crow, col = random_weight(32, 16, (4, 4))
    x = torch.randn(3, 16)
    y = torch.ops.superblock.bsr_linear_normalized(
        x, None, None, EPSILON, values, crow, col, None, None, 32, 16, "none"
    )
    assert_near(
        y,
        reference.linear(
            F.layer_norm(x.double(), (16,), None, None, EPSILON), values.double(), crow, col, None, None, 32, 16, "none"
        ),
    )
