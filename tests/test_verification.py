"""A model's forms are compared before anything else is made of them."""

from __future__ import annotations

import pytest
import torch
from networks import Transformer
from torch import nn

from superblock import SupermaskConfig, TileSparsity, apply_supermask, sparsify_weights
from superblock.errors import ModelError
from superblock.surgery import masked_weights
from superblock.verification import TOLERANCES, cast, verify_forms


@pytest.fixture
def model() -> nn.Module:
    model = Transformer().eval()
    apply_supermask(model, SupermaskConfig(linear=TileSparsity(0.75, 4)))
    return model


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_every_form_on_the_way_is_compared(model: nn.Module, dtype: torch.dtype) -> None:
    found, report = verify_forms(model, torch.randn(2, 5, 12, dtype=dtype), dtype, sparsify=True, bsr=0)
    assert found.forms == ("masked", "folded", "bsr")
    assert len(found.differences) == 2
    assert found.largest_difference <= found.tolerance * max(1, found.largest_output)
    assert {layer.target for layer in report.layers} == {0.75}


def test_a_model_in_one_form_has_nothing_to_differ(model: nn.Module) -> None:
    sparsify_weights(model)
    found, report = verify_forms(model, torch.randn(2, 5, 12), torch.float32)
    assert (found.forms, found.largest_difference, found.lines()) == (("folded",), 0.0, ["form: folded"])
    assert len(report.layers) == 10


def test_an_output_that_is_not_finite_is_refused(model: nn.Module) -> None:
    model.get_parameter("head.bias").data[0] = float("inf")
    with pytest.raises(ModelError, match=r"the masked model's output is not finite in torch\.float32"):
        verify_forms(model, torch.randn(2, 5, 12), torch.float32, sparsify=True)


def test_a_cast_leaves_the_scores_and_so_the_masks(model: nn.Module) -> None:
    before = [mask.mask() for *_, mask in masked_weights(model)]
    cast(model, torch.bfloat16)
    assert model.get_parameter("head.bias").dtype == torch.bfloat16
    for (*_, mask), kept in zip(masked_weights(model), before, strict=True):
        assert mask.scores.dtype == torch.float32
        assert torch.equal(mask.mask(), kept)
