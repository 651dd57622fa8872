"""The native core's shared library: found, loaded, its instruction set chosen, once."""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch  # Its OpenMP runtime must be loaded first: the core uses that one.

from superblock.errors import BackendError

LIBRARY = "libsuperblock.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MULTIPLE = 8  # Of block sides.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
UNSUPPORTED = 2  # A status of the core's.
ISA_VARIABLE = "SUPERBLOCK_CPU_ISA"
PROCESS = os.getpid()  # Another one after a fork.
MEND = "install a C compiler (gcc or clang) and reinstall superblock"


def _structure(name: str, *fields: tuple[str, str | type[Structure]]) -> type[Structure]:
    """A C structure from ``(type, "name name ...")`` rows: the order is that of ``csrc/superblock.h``."""
    kinds = {"pointer": c_void_p, "int64": c_int64, "int32": c_int32, "float": c_float}
    rows = []
    for names, kind in fields:
        rows += [(each, kinds[kind] if isinstance(kind, str) else kind) for each in names.split()]
    return type(name, (Structure,), {"_fields_": rows})


Weight = _structure(
    "Weight",
    ("values crow cols ids", "pointer"),
    ("out_features in_features block_out block_in out_stride in_stride block_stride", "int64"),
)
Window = _structure(
    "Window",
    ("kernel_h kernel_w stride_h stride_w padding_h padding_w dilation_h dilation_w", "int64"),
    ("height width out_height out_width image_stride row_stride pixel_stride channels", "int64"),
)
Norm = _structure("Norm", ("weight bias", "pointer"), ("epsilon", "float"), ("enabled", "int32"))
Product = _structure(
    "Product",
    ("weight", Weight),
    ("window", Window),
    ("norm", Norm),
    ("x bias residual y preactivation", "pointer"),
    ("tokens x_stride y_stride residual_stride", "int64"),
    ("dtype activation threads residual_first", "int32"),
)
# ``sb_rows``, as bytes: filled in at once, where a structure takes as long for every field.
pack_rows = struct.Struct("4P3q2i").pack
pack_step = struct.Struct("P4P3q2i").pack  # ``sb_step``: the address of a product before its rows.
FeedForward = _structure("FeedForward", ("first", Product), ("second", Product), ("z dbias", "pointer"))
SelfAttention = _structure(
    "SelfAttention",
    ("projection", Product),
    ("output", Product),
    ("sequences heads features", "int64"),
    ("scale", "float"),
    ("threads", "int32"),
)
Sampled = _structure(
    "Sampled",
    ("weight", Weight),
    ("window", Window),
    ("grad x", "pointer"),
    ("tokens grad_stride x_stride", "int64"),
    ("dtype activation threads", "int32"),
)
Gradient = _structure(
    "Gradient",
    ("grad z dz dbias", "pointer"),
    ("tokens features grad_stride", "int64"),
    ("dtype activation threads", "int32"),
)
Attention = _structure(
    "Attention",
    ("q k v y", "pointer"),
    ("batch heads queries keys features", "int64"),
    ("q_batch q_head q_token k_batch k_head k_token v_batch v_head v_token y_batch y_head y_token", "int64"),
    ("scale", "float"),
    ("dtype threads", "int32"),
)


def find() -> Path | None:
    """Where the installed library lies: beside the package, or where an editable install put it."""
    beside = Path(__file__).parents[1] / LIBRARY
    if beside.exists():
        return beside
    try:
        files = metadata.files("superblock") or []
    except metadata.PackageNotFoundError:
        return None
    installed = (Path(str(file.locate())) for file in files if file.name == LIBRARY)
    return next((path for path in installed if path.exists()), None)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why there is no native core and how to mend it, or ``None``."""
    path = find()
    if path is None:
        return f"the native CPU core is not built: {MEND}"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native CPU core cannot be loaded ({error}): {MEND}"
    return None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded core.

    Raises:
        BackendError: there is none, or it lacks what ``SUPERBLOCK_CPU_ISA`` asks for.
    """
    reason = missing()
    if reason is not None:
        raise BackendError(reason)
    core = ctypes.CDLL(str(find()))
    for name, structure in (
        ("sb_run_product", Product),
        ("sb_run_feed_forward", FeedForward),
        ("sb_run_sampled", Sampled),
        ("sb_run_activation_gradient", Gradient),
        ("sb_run_attention", Attention),
        ("sb_run_self_attention", SelfAttention),
    ):
        getattr(core, name).argtypes = [POINTER(structure)]
    # Those that run rows go without argtypes: what checks them takes longer than all else of a call.
    core.sb_available.restype = core.sb_current_name.restype = c_char_p
    core.sb_run_feed_forward_gradients.argtypes = [
        POINTER(FeedForward), POINTER(Sampled), POINTER(Sampled), POINTER(Gradient),
    ]  # fmt: skip
    core.sb_run_in_turn.argtypes = [c_char_p, c_int64]
    core.sb_run_encoder_rows.argtypes = [c_void_p, c_int64, c_void_p, c_char_p]
    core.sb_move_to_huge_pages.argtypes, core.sb_move_to_huge_pages.restype = [c_void_p, c_int64], None
    core.sb_run_peak.argtypes, core.sb_run_peak.restype = [c_int32, c_int64, c_int32], c_double
    core.sb_select.argtypes = [c_char_p]
    core.sb_select.restype = c_int
    os.register_at_fork(after_in_child=core.sb_disable_threads)
    _choose(core, os.environ.get(ISA_VARIABLE))
    return core


def unsupported(dtype: torch.dtype, block_height: int, block_width: int) -> str | None:
    """Why a case goes to the reference: said by ``superblock info``."""
    if dtype not in DTYPES:
        return f"the native core multiplies float32, bfloat16 and float16, not {dtype}"
    if block_height % MULTIPLE or block_width % MULTIPLE or not block_height or not block_width:
        return f"the native core takes block sides that are multiples of {MULTIPLE}, not {block_height} × {block_width}"
    reason = missing()
    if reason is None:
        library()  # Raises when it lacks what SUPERBLOCK_CPU_ISA asks for: nothing falls back silently.
    return reason


def available() -> list[str]:
    """The instruction sets that both the build and the machine have, best first."""
    names: bytes = library().sb_available()
    return names.decode().split()


def current() -> str:
    """The instruction set in use."""
    name: bytes = library().sb_current_name()
    return name.decode()


def _choose(core: ctypes.CDLL, name: str | None) -> None:
    if name and core.sb_select(name.encode()):
        options = core.sb_available().decode().replace(" ", ", ")
        raise BackendError(f"{ISA_VARIABLE} must be one that this machine and build have ({options}), got {name!r}")


def select(name: str) -> None:
    """Use the named instruction set from now on.

    Raises:
        BackendError: this machine or build does not have it.
    """
    _choose(library(), name)
