"""Which parameters are decayed how, how learning rates go, how the average follows."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from superblock import SupermaskConfig, TileSparsity, apply_supermask, models, score_parameters
from superblock.training.average import make_average, update_average
from superblock.training.config import AverageConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from superblock.training.log import Log, duration
from superblock.training.loop import Plan
from superblock.training.optim import make_optimizer, parameter_groups
from superblock.training.resume import advance
from superblock.training.schedule import make_schedule


def names_by_decay(model: nn.Module, config: OptimizerConfig) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    return {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_scores_are_a_group_of_their_own_without_decay() -> None:
    model = models.build("vit_digits")
    apply_supermask(model, SupermaskConfig(linear=TileSparsity(0.5, 16)))
    first, last = parameter_groups(model, OptimizerConfig(lr=0.1, weight_decay=0.3, score_lr=2.0))
    assert first["weight_decay"] == 0.3
    assert last == {"params": score_parameters(model), "weight_decay": 0.0, "lr": 2.0}
    assert parameter_groups(model, OptimizerConfig(lr=0.1))[-1]["lr"] == 0.1
    count = len(first["params"]) + len(last["params"])
    assert count == len(list(model.parameters()))


def test_decays_of_their_own_split_the_parameters() -> None:
    model = models.build("vit_digits")
    config = OptimizerConfig(
        weight_decay=0.3, norm_weight_decay=0.2, bias_weight_decay=0.1, transformer_embedding_decay=0.05
    )
    found = names_by_decay(model, config)
    assert found[0.05] == {"class_token", "encoder.pos_embedding"}
    assert found[0.2] == {name for name, _ in model.named_parameters() if "ln" in name and name.endswith("weight")}
    assert found[0.1] == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    without_bias = names_by_decay(model, OptimizerConfig(weight_decay=0.3, norm_weight_decay=0.2))
    assert without_bias[0.2] == {name for name, _ in model.named_parameters() if "ln" in name}


def test_frozen_and_shared_parameters_are_left_out_or_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    (group,) = parameter_groups(model, OptimizerConfig())
    assert len(group["params"]) == 4


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9, "eps": 0.0316, "alpha": 0.9}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 1e-4}),
    ],
)
def test_optimizers_are_those_of_the_reference(name: Any, kind: type, options: dict[str, Any]) -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), OptimizerConfig(name=name))
    assert isinstance(optimizer, kind)
    assert options.items() <= optimizer.param_groups[0].items()


def rates(config: ScheduleConfig, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, config, epochs)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(step_size=2), [1, 1, 0.1, 0.1, 0.01]),
        (ScheduleConfig("exponentiallr", gamma=0.5), [1, 0.5, 0.25, 0.125, 0.0625]),
        (
            ScheduleConfig("cosineannealinglr", min_lr=0.2),
            [0.6 + 0.4 * math.cos(math.pi * epoch / 5) for epoch in range(5)],
        ),
        (ScheduleConfig(warmup_epochs=2, warmup_decay=0.5), [0.5, 0.5, 1, 1, 1]),
        (
            ScheduleConfig("cosineannealinglr", warmup_epochs=2, warmup_method="linear", warmup_decay=0.2),
            [0.2, 0.6, 1, 0.75, 0.25],
        ),
        (
            ScheduleConfig("cosineannealinglr", warmup_epochs=10, warmup_method="linear", warmup_decay=0.5),
            [0.5, 0.55, 0.6, 0.65, 0.7],
        ),
    ],
)
def test_learning_rates_go_as_they_should(config: ScheduleConfig, expected: list[float]) -> None:
    assert rates(config, 5) == pytest.approx(expected)


def test_a_schedule_can_be_brought_to_a_later_epoch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = ScheduleConfig("cosineannealinglr", warmup_epochs=2, warmup_method="linear", warmup_decay=0.2)
    advance(make_schedule(optimizer, config, 5), 3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates(config, 5)[3])


def test_the_average_follows_with_the_adjusted_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    config = TrainConfig(data=DataConfig(batch_size=8), average=AverageConfig(steps=5, decay=0.99), epochs=10)
    average = make_average(model, config, world_size=2)
    assert average is not None
    nn.init.ones_(model.weight)
    update_average(average, model, warming_up=True)
    assert average.module.weight.item() == 1
    nn.init.zeros_(model.weight)
    update_average(average, model, warming_up=True)
    assert average.module.weight.item() == 0
    nn.init.ones_(model.weight)
    update_average(average, model, warming_up=False)
    nn.init.zeros_(model.weight)
    update_average(average, model, warming_up=False)
    assert average.module.weight.item() == pytest.approx(1 - 0.01 * (2 * 8 * 5) / 10)


def test_the_images_of_an_epoch_divide_into_updates() -> None:
    plan = Plan(total=37, batch=12, steps=4, accumulation=3)
    assert [plan.images(step) for step in range(4)] == [12, 12, 12, 1]
    assert [plan.images_of_update(step) for step in range(4)] == [36, 36, 36, 1]
    assert [plan.updates_after(step) for step in range(4)] == [False, False, True, True]


def test_durations_read_as_hours_minutes_and_seconds() -> None:
    assert duration(12.9) == "0:00:12"
    assert duration(3723) == "1:02:03"


def test_a_terminal_shows_a_bar_and_a_file_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(every=2)
    for _ in log.track(range(3), "Epoch: [0]", steps=3, images=8):
        log.status = "loss 1.0"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["Epoch: [0] [2/3]", "Epoch: [0] [3/3]"]
    assert all(line.endswith("loss 1.0") and "images/s  left 0:00:00" in line for line in lines)
    log = Log()
    log.console = Console(file=sys.stdout, force_terminal=True, width=120)
    assert list(log.track(range(3), "Epoch: [0]", steps=3, images=8)) == [0, 1, 2]
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert "images/s" in shown
    assert list(Log(quiet=True).track(range(3), "", steps=3, images=8)) == [0, 1, 2]
    assert capsys.readouterr().out == ""
