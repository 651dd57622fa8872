"""One entry for every file that weights come in: it is recognised by what it holds, not by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from superblock import checkpoint, hub
from superblock.agreement import check_agreement
from superblock.config import SupermaskConfig
from superblock.convert import to_bsr
from superblock.errors import CheckpointError, ConfigError
from superblock.files import read_checkpoint
from superblock.nn import BSRWeight
from superblock.original import is_original, load_original, training_arguments
from superblock.original_optimizer import states_by_name
from superblock.report import Report
from superblock.surgery import (
    apply_supermask,
    folds,
    mark_folded,
    masked_weights,
    sparsify_weights,
    supermask_report,
)
from superblock.targets import WeightSite, select

Form = Literal["dense", "masked", "folded", "bsr"]


@dataclass(frozen=True)
class Loaded:
    """What a model became by :func:`load_weights`.

    ``supermask`` is the configuration of its masks, ``content`` the checkpoint as a dict in our own format (``model``,
    ``model_ema``, ``epoch``, ``config``, …) where it was one of training, ``notices`` what the user should know.
    The content of an original checkpoint has ``optimizer_by_name`` (:mod:`superblock.original_optimizer`) in place of
    ``optimizer``.
    """

    form: Form
    supermask: SupermaskConfig | None = None
    content: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()


def load_weights(
    model: nn.Module, path: str | Path, config: SupermaskConfig | None = None, *, ema: bool = False
) -> Loaded:
    """Load a file into a freshly built dense model, in place, with the masks or BSR layers that it describes.

    Takes ``.safetensors`` (a deployable model, or a plain state), our training checkpoints, those of the original
    SuperBlock, plain dense states (also under a key ``model`` or ``state_dict``), and ``hf://owner/name/file`` for
    any of these on the Hugging Face hub.

    Args:
        model: dense, of the file's architecture.
        path: the file.
        config: the flags: what to mask in a dense state; must agree with a file that says so itself.
        ema: load the averaged weights of a training checkpoint.

    Raises:
        CheckpointError: missing, truncated, of another model, or with foreign classes, which are never executed.
        ConfigError: ``config`` contradicts the file.
    """
    return open_weights(path).load_into(model, config, ema=ema)


def open_weights(path: str | Path) -> WeightsFile:
    """Read a file of weights, so that a model can be built by what it says of itself; see :func:`load_weights`."""
    file = hub.fetch(str(path)) if hub.is_uri(path) else Path(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {path}: {_advice(file)}")
    if not is_safetensors(file):
        content: Any = read_checkpoint(file)
    elif checkpoint.FORMAT in _metadata(file):
        return WeightsFile(str(path), file, {}, {}, checkpoint.describe(file))
    else:
        content = load_file(file)
    state = state_of(content, str(path))
    said: dict[str, Any] = {}
    if content.get("format") == checkpoint.FORMAT:
        if content.get("version") != checkpoint.VERSION:
            raise CheckpointError(
                f"{path} has format version {content.get('version')}, expected {checkpoint.VERSION}: upgrade superblock"
            )
        said = content.get("config") or {}
    elif is_original(state):
        said = {"architecture": training_arguments(content).get("model")}
    return WeightsFile(str(path), file, content, state, said)


@dataclass(frozen=True)
class WeightsFile:
    """An opened file of weights.

    ``source`` is its name, ``file`` where it lies, ``content`` what it holds and ``state`` the model's state in that
    (both empty for a deployable model, whose tensors are read when they are loaded), ``said`` what it says of its
    model: ``architecture``, ``num_classes``, ``image_size``, ``supermask``.
    """

    source: str
    file: Path
    content: Mapping[str, Any]
    state: Mapping[str, Tensor]
    said: Mapping[str, Any]

    @property
    def num_classes(self) -> int | None:
        """How many classes the model tells apart: as it says, else the outputs of its last weight."""
        if self.said.get("num_classes"):
            return int(self.said["num_classes"])
        weights = [value for key, value in self.state.items() if key.endswith("weight") and value.dim() > 1]
        return weights[-1].shape[0] if weights else None

    @property
    def supermask(self) -> SupermaskConfig:
        """What the file says is masked."""
        plain = self.said.get("supermask")
        return SupermaskConfig.from_dict(plain) if plain else SupermaskConfig()

    def load_into(self, model: nn.Module, config: SupermaskConfig | None = None, *, ema: bool = False) -> Loaded:
        """Load into a dense model, in place; see :func:`load_weights`."""
        flags = config or SupermaskConfig()
        if not self.content:
            return self._load_deployable(model, flags, ema)
        if self.content.get("format") == checkpoint.FORMAT:
            return self._load_training(model, flags, ema)
        if is_original(self.state):
            return self._load_original(model, flags, ema)
        checkpoint.load_matching(model, self._chosen(ema), self.source)
        return self._masked_by(flags, model, None)

    def _load_training(self, model: nn.Module, flags: SupermaskConfig, ema: bool) -> Loaded:
        stored = self.supermask
        if stored.active:
            check_agreement(model, flags, stored, self.source)
            apply_supermask(model, stored)
        checkpoint.load_matching(model, self._chosen(ema), self.source)
        content = dict(self.content)
        return Loaded("masked", stored, content) if stored.active else self._masked_by(flags, model, content)

    def _load_original(self, model: nn.Module, flags: SupermaskConfig, ema: bool) -> Loaded:
        content = {**self.content, "model": self.state}
        found = load_original(model, content, flags, ema=ema, source=self.source)
        upgraded = {
            "format": checkpoint.FORMAT,
            "version": checkpoint.VERSION,
            "model": found.model,
            "model_ema": found.model_ema,
            "epoch": self.content.get("epoch", -1),
            "optimizer_by_name": states_by_name(content, model),
            "config": {"supermask": found.config.to_dict()},
        }
        return Loaded(form_of(model), found.config, upgraded, found.notices)

    def _load_deployable(self, model: nn.Module, flags: SupermaskConfig, ema: bool) -> Loaded:
        if ema:
            raise CheckpointError(f"{self.source} holds one model, no averaged weights: load it without --model-ema")
        stored = self.supermask
        sites = []
        if stored.active:
            check_agreement(model, flags, stored, self.source)
            sites = select(model, stored)
        checkpoint.load(self.file, model)
        mark_folded([site for site in sites if _holds(model, site)], stored)
        notices = (f"{self.source} is sparse already: the sparsity flags change nothing",) if flags.active else ()
        return Loaded(form_of(model), stored if stored.active else None, None, notices)

    def _masked_by(self, flags: SupermaskConfig, model: nn.Module, content: dict[str, Any] | None) -> Loaded:
        """A dense state takes the masks of the flags."""
        if not flags.active:
            return Loaded("dense", None, content)
        apply_supermask(model, flags)
        return Loaded("masked", flags, content)

    def _chosen(self, ema: bool) -> dict[str, Tensor]:
        return averaged_state(self.content, self.source) if ema else dict(self.state)


def take_form(model: nn.Module, sparsify: bool, bsr: int | None) -> Report | None:
    """Bring a loaded model into the form that ``--sparsify-weights`` and ``--bsr`` ask for, in place.

    Args:
        model: dense, masked, folded or converted.
        sparsify: fold the masks.
        bsr: the block's side, 0 for each layer's tile, ``None`` to leave folded weights dense.

    Returns:
        The report of what was folded or converted; ``None`` where there was nothing to do: a model that is converted
        already stays as it is.

    Raises:
        ConfigError: folding was asked for and there is no mask.
    """
    form = form_of(model)
    if not sparsify or form == "bsr":
        return None
    if form == "dense":
        raise ConfigError(
            "--sparsify-weights has no masks to fold: give --sparsity-linear (or conv1x1, conv), or a masked checkpoint"
        )
    report = sparsify_weights(model) if form == "masked" else supermask_report(model)
    return report if bsr is None else to_bsr(model, bsr or None)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is safetensors, by its name or by the JSON header it opens with."""
    try:
        with Path(path).open("rb") as stream:
            return Path(path).suffix == ".safetensors" or stream.read(9)[8:] == b"{"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def state_of(content: Any, source: str) -> dict[str, Tensor]:
    """The model's state in what a checkpoint file held, without a wrapper's ``module.`` before every key."""
    if isinstance(content, Mapping):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise CheckpointError(f"{source} holds no model: expected a state_dict, or a dict with one under 'model'")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def averaged_state(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The state of the averaged model (EMA) in a training checkpoint."""
    averaged = content.get("model_ema")
    if not averaged:
        raise CheckpointError(f"{source} holds no averaged weights (model_ema): load it without --model-ema")
    return {key.removeprefix("module."): value for key, value in averaged.items() if key != "n_averaged"}


def form_of(model: nn.Module) -> Form:
    """The form that a model is in: the furthest that any of its layers has come."""
    if any(isinstance(module, BSRWeight) for module in model.modules()):
        return "bsr"
    if any(True for _ in masked_weights(model)):
        return "masked"
    return "folded" if any(True for _ in folds(model)) else "dense"


def _holds(model: nn.Module, site: WeightSite) -> bool:
    """Whether the layer is still there, not swapped for its BSR form."""
    return any(module is site.module for module in model.modules())


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error


def _advice(path: Path) -> str:
    if path.is_dir():
        return "it is a folder, give a .pth or .safetensors file in it"
    name = hub.published_name(path)
    return f"fetch it with: superblock download {name}" if name else "give the path of a .pth or .safetensors file"
