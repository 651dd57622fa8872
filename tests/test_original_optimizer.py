"""The original's optimizer state reaches the parameters that it belongs to, whatever groups they are in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from superblock import score_parameters
from superblock.original import load_original
from superblock.original_optimizer import restore, states_by_name


class OriginalLinear(nn.Linear):
    """A masked layer's parameters as the original registers them."""

    def __init__(self, inputs: int, outputs: int, untrained: bool) -> None:
        super().__init__(inputs, outputs)
        self.scores = nn.Parameter(torch.randn(outputs // 4, inputs // 4))
        self.shift = nn.Parameter(torch.zeros(1), requires_grad=untrained)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=untrained)


@pytest.fixture(params=[True, False], ids=["all parameters", "trained parameters"])
def checkpoint(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One step of AdamW on an original-like model, all of whose gradients tell the parameters apart."""
    model = nn.Sequential(
        OriginalLinear(8, 16, request.param), nn.BatchNorm1d(16), OriginalLinear(16, 8, request.param)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for number, parameter in enumerate(trained):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    args = {"sparsity_linear": 0.5, "sp_linear_tile_size": 4}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "args": args}


@pytest.fixture
def model(checkpoint: dict[str, Any]) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    load_original(model, checkpoint)
    return model


def test_each_parameter_gets_its_own_state(checkpoint: dict[str, Any], model: nn.Module) -> None:
    states = states_by_name(checkpoint, model)
    scores = {id(parameter) for parameter in score_parameters(model)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in scores]
    optimizer = torch.optim.AdamW([{"params": score_parameters(model), "lr": 0.1}, {"params": others}])
    assert restore(optimizer, model, states) == len(list(model.parameters())) == 8
    step = 5 if len(checkpoint["optimizer"]["state"]) == 12 else 3
    first = {
        "0.parametrizations.weight.original": 1.0,
        "0.bias": 2.0,
        "0.parametrizations.weight.0.scores": 3.0,
        "1.weight": step + 1.0,
        "2.parametrizations.weight.original": step + 3.0,
    }
    for name, gradient in first.items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.full_like(parameter, 0.1 * gradient))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_an_optimizer_over_other_parameters_is_left_out(checkpoint: dict[str, Any], model: nn.Module) -> None:
    group = checkpoint["optimizer"]["param_groups"][0]
    group["params"] = group["params"][:-1]
    assert states_by_name(checkpoint, model) == {}
    checkpoint["optimizer"]["param_groups"] *= 2
    assert states_by_name(checkpoint, model) == {}


def test_shapes_that_do_not_fit_leave_it_out(checkpoint: dict[str, Any], model: nn.Module) -> None:
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    assert states_by_name(checkpoint, model) == {}


def test_an_optimizer_that_took_no_step_has_no_state(checkpoint: dict[str, Any], model: nn.Module) -> None:
    checkpoint["optimizer"]["state"] = {}
    assert states_by_name(checkpoint, model) == {}
    assert states_by_name({"model": checkpoint["model"]}, model) == {}
