"""ResNet blocks that run in one call give what they give one by one, and are called where anybody could tell."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from native_cases import Seen, assert_compiles_whole, near, needs_core
from test_batch_norm import folded
from torch import Tensor, nn

import superblock as sb
from superblock.errors import ConfigError, MatrixError
from superblock.nn import BSRConv2d
from superblock.ops.cpu_conv2d import Turns
from superblock.sequences import ConvolutionalSequential

torchvision = pytest.importorskip("torchvision", reason="needs the vision extra")
timm = pytest.importorskip("timm", reason="needs the vision extra")
pytestmark = needs_core
resnet, timm_resnet = torchvision.models.resnet, timm.models.resnet


def downsample(in_: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_, out, 1, 2, bias=False), nn.BatchNorm2d(out))


def basic() -> list[nn.Module]:
    return [resnet.BasicBlock(16, 32, 2, downsample(16, 32)), *(resnet.BasicBlock(32, 32) for _ in range(2))]


def bottleneck() -> list[nn.Module]:
    return [resnet.Bottleneck(16, 16, 2, downsample(16, 64)), *(resnet.Bottleneck(64, 16) for _ in range(3))]


def timm_bottleneck() -> list[nn.Module]:
    first = timm_resnet.Bottleneck(16, 16, 2, downsample(16, 64), act_layer=nn.SiLU)
    return [first, timm_resnet.Bottleneck(64, 16, act_layer=nn.SiLU)]


def timm_average() -> list[nn.Module]:
    """Whose shortcut is more than a convolution."""
    return [timm_resnet.Bottleneck(16, 16, 2, timm_resnet.downsample_avg(16, 64, 1, 2)), timm_resnet.Bottleneck(64, 16)]


def grouped() -> list[nn.Module]:
    return [resnet.Bottleneck(16, 16, 2, downsample(16, 64), groups=2), resnet.Bottleneck(64, 16)]


builds = pytest.mark.parametrize("build", [basic, bottleneck, timm_bottleneck])


def converted(build: Callable[[], list[nn.Module]], tile: int = 8) -> tuple[nn.Sequential, nn.Sequential]:
    """Folded blocks, and the same converted."""
    tiles = sb.TileSparsity(0.5, tile)
    model = nn.Sequential(*build())
    folded(model, sb.SupermaskConfig(conv1x1=tiles, conv=tiles))
    twin = copy.deepcopy(model)
    sb.to_bsr(model)
    assert type(model) is ConvolutionalSequential
    return twin, model


def images(count: int = 2, height: int = 11, width: int = 9) -> Tensor:
    return torch.randn(count, 16, height, width).to(memory_format=torch.channels_last)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many convolutions each call ran."""
    counts: list[int] = []
    original = Turns.run
    monkeypatch.setattr(Turns, "run", lambda turns: (counts.append(len(turns._steps)), original(turns))[1])
    return counts


@builds
@pytest.mark.usefixtures("nan_filled")
def test_one_call_gives_what_the_blocks_give(build, runs: list[int]) -> None:
    twin, model = converted(build)
    convolutions = sum(isinstance(module, BSRConv2d) for module in model.modules())
    inputs = [
        images(),
        images(1, 14, 14),
        images(3, 1, 1),
        torch.randn(2, 16, 8, 8),
        images(2, 8, 16)[..., ::2],
        torch.randn(1, 8, 8, 16).expand(3, 8, 8, 16).permute(0, 3, 1, 2),
    ]
    copies = model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for x in inputs:
                given, expected = x.clone(), twin(x)
                for one in copies:
                    y = one(x)
                    near(y, expected)
                    assert y.is_contiguous(memory_format=torch.channels_last)
                    assert torch.equal(x, given)
    assert runs == [convolutions] * (2 * len(inputs) * len(copies))


@builds
def test_results_do_not_share_memory(build) -> None:
    twin, model = converted(build)
    inputs = [images(2, size, 9) for size in range(5, 25)]
    with torch.inference_mode():
        kept = [model(x) for x in inputs]
        for x, y in zip(inputs, kept, strict=True):
            near(y, twin(x))
        with ThreadPoolExecutor(4) as pool:
            for x, y in zip(inputs, pool.map(torch.inference_mode()(model), inputs), strict=True):
                near(y, twin(x))


@builds
def test_the_memory_between_convolutions_is_used_again(build, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = converted(lambda: [*build(), *(copy.deepcopy(build()[-1]) for _ in range(8))])
    results: list[set[int]] = []
    run = Turns.run

    def noted(turns: Turns) -> None:
        results.append({entry.data_ptr() for entry in turns._alive if isinstance(entry, Tensor)})
        run(turns)

    monkeypatch.setattr(Turns, "run", noted)
    with torch.inference_mode():
        model(images())
    assert len(results[0]) <= 9  # Of twenty and more.


@builds
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_who_could_tell_is_told(build, runs: list[int]) -> None:
    twin, model = converted(build)
    x = images()
    near(model(x), twin(x))  # Gradients are on.
    with torch.no_grad():
        expected = twin(x)
        with Seen() as seen:
            near(model(x), expected)
        assert any("bsr_conv2d" in name for name in seen.names)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        called = []
        for module in model.modules():
            if module is not model and not isinstance(module, nn.Identity | nn.Sequential):
                hook = module.register_forward_hook(lambda *_: called.append(1))
                near(model(x), expected)
                hook.remove()
        assert len(called) > 2 * len(model)
        assert not runs
        near(model(x), expected)
    assert len(runs) == 1


@pytest.mark.parametrize(("build", "tile"), [(timm_average, 8), (grouped, 8), (bottleneck, 4)])
def test_what_is_more_than_products_is_called(build, tile: int, runs: list[int]) -> None:
    twin, model = converted(build, tile)
    with torch.inference_mode():
        x = images()
        near(model(x), twin(x))
        assert model(images(0)).shape[0] == 0
    assert not runs


@builds
def test_what_is_replaced_meanwhile_lives_until_it_is_read(build, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = converted(build)
    x, run = images(), Turns.run

    def replace(turns: Turns) -> None:
        """As another thread may, between preparing and running."""
        for layer in model.modules():
            if isinstance(layer, BSRConv2d):
                layer.values, layer.bias = nn.Parameter(layer.values + 1), nn.Parameter(layer.bias + 1)
        junk = [torch.full_like(layer.values, 1e9) for layer in model.modules() if isinstance(layer, BSRConv2d)]
        run(turns)
        del junk

    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(Turns, "run", replace)
        assert torch.equal(model(x), expected)


def test_an_identity_that_is_none_is_called(runs: list[int]) -> None:
    class Twice(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    twin, model = converted(timm_bottleneck)
    with torch.inference_mode():
        for one in (twin, model):
            one[1].aa = Twice()
        x = images()
        near(model(x), twin(x))
    assert not runs


@pytest.mark.parametrize("member", ["depth", "_depth", "__iter__"])
def test_a_class_with_members_of_its_own_stays(member: str) -> None:
    kind = type("Stack", (nn.Sequential,), {member: lambda self: iter(self._modules.values())})
    model = kind(*basic())
    folded(model)
    sb.to_bsr(model)
    assert type(model) is kind


def test_an_unknown_activation_is_refused_as_ever(runs: list[int]) -> None:
    _, model = converted(basic)
    model[0].downsample[0].activation = "tanh"
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"activation must be one of none, relu.*got 'tanh'"):
        model(images())
    assert not runs


@builds
def test_images_that_do_not_fit_are_refused(build, runs: list[int]) -> None:
    _, model = converted(build)
    with torch.inference_mode():
        with pytest.raises(MatrixError, match=r"x must be \[n, 16, h, w\], got \(1, 15, 8, 8\)"):
            model(torch.zeros(1, 15, 8, 8))
        with pytest.raises(MatrixError, match=r"x must be of torch.float32 on cpu, got torch.float64"):
            model(torch.zeros(1, 16, 8, 8).double())
    assert not runs


@builds
def test_inference_compiles_whole(build, runs: list[int]) -> None:
    _, model = converted(build)
    assert_compiles_whole(model, images())
    assert len(runs) == 1
