"""Models by name: torchvision's classifiers, timm's as ``timm:<name>``, two small ViTs, and a ViT of any shape."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any
from urllib.error import URLError

import torch
from torch import nn
from torchvision import models as zoo

from superblock.errors import CheckpointError, ConfigError

TIMM = "timm:"
VIT = "vit:"
VIT_OPTIONS = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")

# torchvision VisionTransformers of four layers and width 128 (0.8 million parameters).
SMALL: dict[str, dict[str, int]] = {
    "vit_digits": {"image_size": 8, "patch_size": 4},
    "vit_fashion": {"image_size": 28, "patch_size": 7},
}
_SMALL_SHAPE = {"num_layers": 4, "num_heads": 4, "hidden_dim": 128, "mlp_dim": 512}


def build(
    name: str, num_classes: int | None = None, weights: str | None = None, image_size: int | None = None
) -> nn.Module:
    """Build a classifier, dense.

    Args:
        name: a torchvision classifier, ``timm:<name>``, ``vit_digits`` (8×8 images in patches of 4), ``vit_fashion``
            (28×28 in patches of 7), or ``vit:image_size=32,patch_size=8,num_layers=3,num_heads=4,hidden_dim=64,
            mlp_dim=128``, torchvision's ViT of that shape.
        num_classes: outputs; by default the model's own number (1000 for ImageNet's, 10 for the small ones).
        weights: pretrained weights by torchvision's name (``IMAGENET1K_V1``, ``DEFAULT``) or timm's tag.
        image_size: the side of a square image, told to models that are built for one size.

    Raises:
        ConfigError: an unknown model or unknown weights, or a size or class count that the model cannot take.
        CheckpointError: the weights cannot be downloaded.
    """
    if name.startswith(TIMM):
        return _build_timm(name.removeprefix(TIMM), num_classes, weights, image_size)
    if name.startswith(VIT):
        return _build_vit(name, _vit_options(name), num_classes or 1000, weights, image_size)
    if name in SMALL:
        return _build_vit(name, {**SMALL[name], **_SMALL_SHAPE}, num_classes or 10, weights, image_size)
    if name not in names():
        raise ConfigError(f"unknown model {name!r}{_close(name, names())}: take one of torchvision's, or timm:<name>")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if image_size is not None and takes_image_size(name):
        options |= {"input_size": (image_size,) * 2} if name.startswith("maxvit") else {"image_size": image_size}
    if weights is not None:
        options["weights"] = _torchvision_weights(name, weights)
    return _without_auxiliary_heads(_construct(name, weights, image_size, lambda: zoo.get_model(name, **options)))


def names() -> list[str]:
    """Every name that :func:`build` takes, timm's aside."""
    return [*zoo.list_models(module=zoo), *SMALL]


def native_size(name: str) -> int | None:
    """The side of the images that a small or a spelled-out ViT is made for; ``None`` for all others."""
    if name.startswith(VIT):
        return _vit_options(name)["image_size"]
    return SMALL[name]["image_size"] if name in SMALL else None


def takes_image_size(name: str) -> bool:
    """Whether a model is built for one size of image."""
    if name.startswith(TIMM):
        import timm

        found = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        return bool(found and found.fixed_input_size)
    return name.startswith(("vit_", VIT, "maxvit"))


def preprocessing(name: str, weights: str) -> tuple[int, int, str] | None:
    """Resize, crop and interpolation with which torchvision evaluated pretrained weights; ``None`` for other models."""
    if name.startswith((TIMM, VIT)) or name not in zoo.list_models(module=zoo):
        return None
    wanted = _torchvision_weights(name, weights).transforms()
    return wanted.resize_size[0], wanted.crop_size[0], wanted.interpolation.value


def check_image_size(model: nn.Module, name: str, size: int) -> None:
    """Raise :class:`ConfigError` unless ``model`` can take square images of side ``size``."""
    training = model.training
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{name} cannot take images of {size}×{size} ({reason}): set --train-crop-size and --val-crop-size"
        ) from error
    finally:
        model.train(training)


def _build_vit(
    name: str, options: dict[str, int], num_classes: int, weights: str | None, image_size: int | None
) -> nn.Module:
    if weights is not None:
        raise ConfigError(f"there are no published weights of {name}, got {weights!r}: leave --weights out")
    size = image_size or options["image_size"]
    shape = {**options, "image_size": size, "num_classes": num_classes}
    return _construct(name, None, size, lambda: zoo.VisionTransformer(**shape))


def _vit_options(name: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in name.removeprefix(VIT).split(",")]
    options = {key.strip(): int(value) for key, _, value in pairs if value.strip().isdecimal()}
    if len(options) != len(pairs) or set(options) != set(VIT_OPTIONS):
        raise ConfigError(f"unknown model {name!r}: expected {VIT}{','.join(f'{key}=<n>' for key in VIT_OPTIONS)}")
    return options


def _build_timm(name: str, num_classes: int | None, weights: str | None, image_size: int | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        known = timm.list_models()
        raise ConfigError(f"unknown model {TIMM + name!r}{_close(name, known, TIMM)}: timm.list_models() has all")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if image_size is not None and takes_image_size(TIMM + name):
        options["img_size"] = image_size
    if weights is not None:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        if weights != "DEFAULT" and weights not in tags:
            available = ", ".join(["DEFAULT", *tags]) if tags else "none"
            raise ConfigError(f"unknown weights {weights!r} of {TIMM}{name}: there are {available}")
        options["pretrained"] = True
        name = name if weights == "DEFAULT" else f"{name}.{weights}"
    return _construct(TIMM + name, weights, image_size, lambda: timm.create_model(name, **options))


def _torchvision_weights(name: str, weights: str) -> Any:
    available = zoo.get_model_weights(name)
    wanted = weights.rpartition(".")[2]  # Also as torchvision writes it: ResNet50_Weights.IMAGENET1K_V1.
    if wanted not in available.__members__:
        raise ConfigError(f"unknown weights {weights!r} of {name}: there are {', '.join(available.__members__)}")
    return available[wanted]


def _construct(name: str, weights: str | None, size: int | None, construct: Callable[[], nn.Module]) -> nn.Module:
    try:
        return construct()
    except (URLError, ConnectionError, TimeoutError) as error:
        raise CheckpointError(f"cannot download the weights {weights} of {name}: {error}") from error
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        given = f" with weights {weights}" if weights else ""
        sized = f" for images of {size}×{size} (--train-crop-size, --val-crop-size)" if size else ""
        raise ConfigError(f"{name} cannot be built{given}{sized}: {reason}") from error


def _without_auxiliary_heads(model: nn.Module) -> nn.Module:
    """GoogLeNet and Inception return several outputs while training: keep the one that counts."""
    if getattr(model, "aux_logits", False):
        model.aux_logits = False  # type: ignore[assignment]
        for head in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, head):
                setattr(model, head, None)
    return model


def _close(name: str, known: Sequence[str], prefix: str = "") -> str:
    found = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {' or '.join(prefix + match for match in found)}?)" if found else ""
