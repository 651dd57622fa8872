"""Whether the forms of one model agree: online masks, folded, BSR."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from superblock.errors import ModelError
from superblock.inspection import model_report
from superblock.report import Report
from superblock.surgery import masked_weights
from superblock.weights import form_of, take_form

# What rounding alone may do to the logits of a deep model, relative to the largest of them (or to 1). float32 is what
# the demo promises; the half types round each of some fifty layers to 2^-8 and 2^-11.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Verification:
    """The largest difference of each form's outputs from those of the first form, and what it may be."""

    forms: tuple[str, ...]
    differences: tuple[float, ...]
    largest_output: float
    tolerance: float

    @property
    def largest_difference(self) -> float:
        """Over all forms; 0 where there is only one."""
        return max(self.differences, default=0.0)

    def lines(self) -> list[str]:
        """What to print."""
        if len(self.forms) < 2:
            return [f"form: {self.forms[0]}"]
        pairs = zip(self.forms[1:], self.differences, strict=True)
        told = ", ".join(f"{form} {difference:.2e}" for form, difference in pairs)
        reach = f"tolerance {self.tolerance:.0e}, outputs up to {self.largest_output:.3g}"
        return [f"largest difference to {self.forms[0]}: {told} ({reach})"]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as the commands write them to JSON."""
        return {**asdict(self), "largest_difference": self.largest_difference}


def verify_forms(
    model: nn.Module, images: Tensor, dtype: torch.dtype, sparsify: bool = False, bsr: int | None = None
) -> tuple[Verification, Report]:
    """Bring a model into the form asked for, in place and in ``dtype``, comparing its outputs on the way.

    Masks are thresholded in the scores' own precision, which a cast would turn into ties.

    Args:
        model: on its device, in eval mode.
        images: a small batch, of ``dtype``.
        dtype: of weights and activations.
        sparsify: fold the masks.
        bsr: the block's side, 0 for the tile's, ``None`` to leave folded weights dense.

    Returns:
        What was compared, and the report of the model in its last form.

    Raises:
        ModelError: the forms do not agree, or an output is not finite.
    """
    cast(model, dtype)
    forms = [form_of(model)]
    outputs = [_output(model, images)]
    report = None
    for block in () if not sparsify else (None,) if bsr is None else (None, bsr):
        report = take_form(model, True, block) or report
        if form_of(model) != forms[-1]:
            forms.append(form_of(model))
            outputs.append(_output(model, images))
    for form, output in zip(forms, outputs, strict=True):
        if not output.isfinite().all():
            raise ModelError(f"the {form} model's output is not finite in {dtype}: try another type or other weights")
    differences = tuple(float((output - outputs[0]).abs().max()) for output in outputs[1:])
    found = Verification(tuple(forms), differences, float(outputs[0].abs().max()), TOLERANCES[dtype])
    if found.largest_difference > found.tolerance * max(1.0, found.largest_output):
        raise ModelError(f"the forms do not agree, so nothing was timed: {found.lines()[0]}")
    return found, report or model_report(model)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model in place, all but the scores of its masks."""
    scores = [(mask, mask.scores.data) for *_, mask in masked_weights(model)]
    model.to(dtype)
    for mask, kept in scores:
        mask.scores.data = kept


@torch.inference_mode()
def _output(model: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = model(images)
    return output.float()
