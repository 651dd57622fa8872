"""Forward and input gradient: every way a tile can lie over blocks, tokens and edges."""

from __future__ import annotations

import pytest
import torch
from triton_cases import ACTIVATIONS, DTYPES, PRODUCTS, Product, check_product


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "grad_input"])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_every_tile(case: Product, transposed: bool, device: str) -> None:
    dtype = DTYPES[PRODUCTS.index(case) % len(DTYPES)]
    check_product(case, dtype, transposed, "none", device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [PRODUCTS[0], PRODUCTS[7], PRODUCTS[11], PRODUCTS[13]], ids=str)
def test_every_dtype(case: Product, dtype: torch.dtype, device: str) -> None:
    check_product(case, dtype, False, "gelu", device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", [PRODUCTS[4], PRODUCTS[8], PRODUCTS[14]], ids=str)
def test_every_activation(case: Product, activation: str, device: str) -> None:
    check_product(case, torch.float32, False, activation, device)
