"""Deployable models: safetensors that hold BSR tensors and a JSON description of the layers they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from superblock.bsr import BSRMatrix
from superblock.convert import dense_linear, fuse, share
from superblock.errors import CheckpointError, ConfigError, MatrixError, ModelError
from superblock.files import write_atomically
from superblock.nn import BSRConv2d, BSRLinear, BSRMultiheadAttention, BSRWeight, FoldedBatchNorm
from superblock.surgery import masked_weights

FORMAT = "superblock"
VERSION = 1


def save(model: nn.Module, path: str | Path, **description: Any) -> None:
    """Write a folded or converted model as safetensors, atomically.

    Args:
        model: without masks; BSR layers are stored as values and indices, all else as it is.
        path: the file, ``*.safetensors``.
        **description: JSON values stored beside the tensors and returned by :func:`describe`. With ``architecture``
            (a name that :func:`superblock.models.build` takes), ``num_classes`` and ``image_size``, :func:`load` needs
            no model.

    Raises:
        ModelError: the model still has masks.
        ConfigError: a description that JSON cannot hold, or under a name of the file's own.
        CheckpointError: the file cannot be written.
    """
    from safetensors.torch import save_file  # Here and below: products need no file format.

    if any(True for _ in masked_weights(model)):
        raise ModelError("the masks are not folded yet: call sparsify_weights before save")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    kept: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in kept:
            aliases[key] = kept[id(tensor)]
        else:
            kept[id(tensor)] = key
            tensors[key] = tensor.detach().contiguous()
    layers = {name: _describe(module) for name, module in model.named_modules() if _describe(module)}
    own = {"format": FORMAT, "version": VERSION, "layers": layers, "aliases": aliases}
    metadata = {"format": "pt", FORMAT: _as_json(own, description)}
    write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata))


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a model that :func:`save` wrote.

    Args:
        path: the file.
        model: the same architecture, dense: it is changed in place. Not needed where the file names its architecture.

    Returns:
        ``model``, with its own device and dtype; or the one that the file describes, on the CPU, in float32.

    Raises:
        CheckpointError: the file is truncated, of another format, or of another model.
    """
    from safetensors import SafetensorError, safe_open

    content = describe(path)
    if model is None:
        model = _build(path, content)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
    tensors |= {alias: tensors[key] for alias, key in content["aliases"].items()}
    for name in content["layers"]:
        if name.rpartition(".")[0] not in content["layers"]:  # An attention installs its projections itself.
            _install(model, name, content["layers"], tensors, path)
    _tie(model, content["aliases"])
    load_matching(model, tensors, str(path))
    fuse(model)
    return model


def describe(path: str | Path) -> dict[str, Any]:
    """The JSON description in a file that :func:`save` wrote."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"no model at {path}: give the path of a .safetensors file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
    try:
        content: dict[str, Any] = json.loads(metadata[FORMAT])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} was not written by SuperBlock: expected a {FORMAT!r} description") from error
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {content.get('version')}, expected {VERSION}: upgrade")
    return content


def load_matching(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """``load_state_dict``, with one line naming the keys where ``state`` is another model's.

    Raises:
        CheckpointError: keys are missing or unknown, or shapes differ; the model is as it was.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source} is of another model than {type(model).__name__}: keys {'; '.join(problems)}")
    model.load_state_dict(state)


def _as_json(own: dict[str, Any], description: dict[str, Any]) -> str:
    for name, value in description.items():
        if name in own:
            raise ConfigError(f"{name} is a name of the file's own ({', '.join(own)}): describe it by another")
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{name} cannot be stored as JSON: {reason}: give numbers, strings, lists, dicts"
            ) from error
    return json.dumps({**own, **description})


def _build(path: str | Path, content: dict[str, Any]) -> nn.Module:
    if not content.get("architecture"):
        raise CheckpointError(f"{path} names no architecture: pass the dense model as the second argument of load")
    from superblock import models

    return models.build(
        content["architecture"], num_classes=content.get("num_classes"), image_size=content.get("image_size")
    )


def _describe(module: nn.Module) -> dict[str, Any] | None:
    options: tuple[str, ...]
    if isinstance(module, BSRMultiheadAttention):
        options = ("num_heads", "dropout", "batch_first")
    elif isinstance(module, BSRConv2d):
        options = ("out_features", "in_features", "stride", "padding", "padding_mode")
        options = (*options, "kernel_shape", "dilation", "groups")
    elif isinstance(module, BSRLinear):
        options = ("out_features", "in_features")
    elif isinstance(module, FoldedBatchNorm):
        options = ("into",)
    else:
        return None
    return {"type": type(module).__name__, **{name: getattr(module, name) for name in options}}


def _install(model: nn.Module, name: str, layers: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> None:
    """Put the described BSR layer, over the file's tensors, wherever the dense one stands."""
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        old = parent.get_submodule(child)
    except AttributeError as error:
        raise CheckpointError(
            f"{path} is of another model than {type(model).__name__}: it describes {name}, which the model lacks"
        ) from error
    if isinstance(old, (BSRWeight, BSRMultiheadAttention)):
        raise CheckpointError(f"{name} is block-sparse already: load into a dense {type(model).__name__}")
    described = layers[name].get("kernel_shape") or [layers[name].get(side) for side in ("out_features", "in_features")]
    if isinstance(old, (nn.Linear, nn.Conv2d)) and list(old.weight.shape) != described:
        there, here = (" × ".join(map(str, shape)) for shape in (described, old.weight.shape))
        raise CheckpointError(
            f"{path} is of another model than {type(model).__name__}: {name} is {there} there and {here} here"
        )
    try:
        new = _layer(name, layers, tensors)
    except (KeyError, TypeError, MatrixError) as error:
        raise CheckpointError(f"{path} is damaged: {name} cannot be rebuilt: {error}") from error
    if isinstance(new, FoldedBatchNorm):
        _take_bias(parent.get_submodule(new.into))
    if isinstance(new, BSRWeight) and new.bias is not None and isinstance(old, (nn.Linear, nn.Conv2d)):
        new.bias = new.bias if old.bias is None else old.bias  # Which may be tied.
    if (like := next((tensor for tensor in old.parameters()), None)) is not None:
        new.to(like.device, like.dtype if like.is_floating_point() else None)
    new.train(old.training)
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if module is old and (place == name or place not in layers):
            above, _, own = place.rpartition(".")
            model.get_submodule(above)._modules[own] = new


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    """Let block-sparse layers that shared their values when they were saved share them."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BSRWeight)}
    for alias, key in aliases.items():
        layer, other = (layers.get(name.removesuffix(".values")) for name in (alias, key))
        if layer is not None and other is not None:
            share(layer, other)


def _take_bias(layer: nn.Module) -> None:
    """Let a dense convolution hold the bias that a folded batch norm gave it."""
    if isinstance(layer, nn.Conv2d) and layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels))


def _layer(name: str, layers: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    options = dict(layers[name])
    kind = options.pop("type")
    if kind == "FoldedBatchNorm":
        return FoldedBatchNorm(**options)
    if kind == "BSRMultiheadAttention":
        in_proj, out_proj = (_projection(f"{name}.{part}", layers, tensors) for part in ("in_proj", "out_proj"))
        return BSRMultiheadAttention(in_proj, out_proj, **options)
    bias = tensors.get(f"{name}.bias")
    matrix = _matrix(name, (options.pop("out_features"), options.pop("in_features")), tensors)
    if kind == "BSRLinear":
        return BSRLinear(matrix, bias)
    if kind == "BSRConv2d":
        lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
        return BSRConv2d(matrix, bias, **{**options, **lists})
    raise KeyError(f"unknown layer type {kind}")


def _projection(name: str, layers: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    if name in layers:
        return _layer(name, layers, tensors)
    return dense_linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _matrix(name: str, shape: tuple[int, int], tensors: dict[str, Tensor]) -> BSRMatrix:
    return BSRMatrix(tensors[f"{name}.crow_indices"], tensors[f"{name}.col_indices"], tensors[f"{name}.values"], shape)
