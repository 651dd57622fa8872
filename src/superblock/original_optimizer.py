"""The optimizer state of an original checkpoint, by parameter name, for a run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

UNTRAINED = ("shift", "scale")

States = dict[str, dict[str, Any]]


def states_by_name(checkpoint: Mapping[str, Any], model: nn.Module) -> States:
    """What the original's optimizer kept for each parameter (``exp_avg``, ``momentum_buffer``, …), by our names.

    The original numbers its parameters as its model registers them, in one group, with or without the untrained
    shift and scale; that order is the state's. Where the count or a shape says otherwise the result is empty.

    Args:
        checkpoint: what the original's trainer saved.
        model: after :func:`superblock.original.load_original`.
    """
    saved = checkpoint.get("optimizer") or {}
    entries, groups = saved.get("state", {}), saved.get("param_groups", [])
    if len(groups) != 1:
        return {}
    numbers = groups[0]["params"]
    buffers = {name for name, _ in model.named_buffers()}
    keys = [key for key in checkpoint["model"] if key not in buffers]
    trained = [key for key in keys if key.rpartition(".")[2] not in UNTRAINED]
    named = next((candidates for candidates in (keys, trained) if len(candidates) == len(numbers)), None)
    if named is None:
        return {}
    parameters = dict(model.named_parameters())
    states: States = {}
    for key, number in zip(named, numbers, strict=True):
        name = _our_name(key, parameters)
        if name is None or number not in entries:
            continue
        shapes = {value.shape for value in entries[number].values() if isinstance(value, Tensor) and value.dim()}
        if shapes - {parameters[name].shape}:
            return {}
        states[name] = dict(entries[number])
    return states


def restore(optimizer: torch.optim.Optimizer, model: nn.Module, states: States) -> int:
    """Give each parameter of ``model`` its state, whatever group it is in; returns how many had one.

    Learning rates and the like stay as the run sets them.
    """
    parameters = dict(model.named_parameters())
    for name, state in states.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: value.to(parameter.device if value.dim() else "cpu", copy=True) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }
    return len(states)


def _our_name(key: str, parameters: Mapping[str, Tensor]) -> str | None:
    """Our name of an original parameter; ``None`` for one that we do not have (shift, scale, unused scores)."""
    prefix, dot, name = key.rpartition(".")
    ours = {"weight": "parametrizations.weight.original", "scores": "parametrizations.weight.0.scores"}.get(name, name)
    return next((known for known in (f"{prefix}{dot}{ours}", key) if known in parameters), None)
