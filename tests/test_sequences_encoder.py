"""Transformer blocks that run in one call give what they give one by one, and are called where somebody could tell."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from native_cases import Seen, assert_compiles_whole, near, needs_core
from test_batch_norm import folded
from torch import Tensor, nn

import superblock as sb
from superblock.nn import BSRLinear
from superblock.ops import cpu
from superblock.residual import ResidualBlock, ResidualEncoderBlock
from superblock.sequences import EncoderSequential

torchvision = pytest.importorskip("torchvision", reason="needs the vision extra")
timm = pytest.importorskip("timm", reason="needs the vision extra")
pytestmark = needs_core
WIDTH, HEADS, BLOCKS = 32, 2, 3


def torchvision_block() -> nn.Module:
    return torchvision.models.vision_transformer.EncoderBlock(HEADS, WIDTH, 2 * WIDTH, 0.1, 0.1)


def timm_block() -> nn.Module:
    return timm.models.vision_transformer.Block(WIDTH, HEADS, qkv_bias=True)


builds = pytest.mark.parametrize("build", [torchvision_block, timm_block])


def converted(
    build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, tile: int = 8
) -> tuple[nn.Sequential, nn.Sequential]:
    """Folded blocks, and the same converted."""
    model = nn.Sequential(*(build() for _ in range(BLOCKS))).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.5)
    folded(model, sb.SupermaskConfig(linear=sb.TileSparsity(0.5, tile)))
    twin = copy.deepcopy(model)
    sb.to_bsr(model)
    assert type(model) is EncoderSequential
    return twin, model


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 70)), WIDTH)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the core for a whole encoder gave something."""
    results: list[bool] = []
    original = cpu.encoder

    def noted(*args):  # type: ignore[no-untyped-def]
        y = original(*args)
        results.append(y is not None)
        return y

    monkeypatch.setattr(cpu, "encoder", noted)
    return results


@builds
@pytest.mark.usefixtures("nan_filled")
def test_one_call_gives_what_the_blocks_give(build, whole: list[bool]) -> None:
    twin, model = converted(build)
    inputs = [
        tokens(),
        tokens(1, 49),
        tokens(4, 131),
        tokens(2, 140)[:, ::2],
        tokens(70, 2).transpose(0, 1),
        torch.randn(2, 70, 2 * WIDTH)[..., :WIDTH],
        torch.randn(2, 70, 2 * WIDTH)[..., ::2],
    ]
    copies = model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for x in inputs:
                given, expected = x.clone(), twin(x)
                for one in copies:
                    near(one(x), expected)
                    assert torch.equal(x, given)
            near(model[:2](inputs[0]), twin[:2](inputs[0]))
    assert whole == [True] * (2 * (len(inputs) * len(copies) + 1))


@builds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_gives_what_single_blocks_give(build, dtype: torch.dtype, whole: list[bool]) -> None:
    _, model = converted(build, dtype)
    x = tokens().to(dtype)
    with torch.inference_mode():
        y, expected = model(x), x
        for block in model:
            expected = block(expected)
    assert torch.equal(y, expected)
    assert whole == [True]


@builds
def test_whatever_is_replaced_is_seen(build, whole: list[bool]) -> None:
    twin, model = converted(build)
    x = tokens()

    def norms(one: nn.Module) -> list[nn.LayerNorm]:
        return [module for module in one.modules() if isinstance(module, nn.LayerNorm)]

    changes: list[Callable[[nn.Module], object]] = [
        lambda one: norms(one)[2].weight.mul_(2),
        lambda one: setattr(norms(one)[1], "eps", 0.5),
        lambda one: setattr(norms(one)[3].bias, "data", torch.ones(WIDTH)),
        lambda one: one.append(one[0]),
        lambda one: one.pop(1),
    ]
    with torch.no_grad():
        model(x)
        for change in changes:
            for one in (twin, model):
                change(one)
            near(model(x), twin(x))
        model[0].mlp = twin[0].mlp
        near(model(x), twin(x))
        model[0] = nn.Identity()
        near(model(x), twin[1:](x))
    assert whole == [True] * (1 + len(changes))


@builds
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_who_could_tell_is_told(build, whole: list[bool]) -> None:
    twin, model = converted(build)
    x = tokens()
    near(model(x), twin(x))  # Gradients are on.
    with torch.no_grad():
        expected = twin(x)
        with Seen() as seen:
            near(model(x), expected)
        assert sum("self_attention" in name for name in seen.names) == BLOCKS
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        model.train()
        model(x)
        model.eval()
        called = []
        modules = [module for name, module in model.named_modules() if "mlp" in name or "norm" in name or "ln" in name]
        for module in (model[1], *modules):
            hook = module.register_forward_hook(lambda *_: called.append(1))
            near(model(x), expected)
            hook.remove()
            own = module.forward
            module.forward = lambda *args, own=own: called.append(1) or own(*args)
            near(model(x), expected)
            del module.forward
        assert len(called) >= 2 * (1 + BLOCKS)
        assert not whole
        near(model(x), expected)
    assert whole == [True]


@builds
def test_what_the_core_leaves_to_the_steps_is_left_to_them(build, whole: list[bool]) -> None:
    twin, model = converted(build)
    with torch.inference_mode():
        few, long, empty = tokens(2, 3), tokens(1, 8200), tokens(0, 70)
        near(model(few), twin(few))
        assert model(empty).shape == (0, 70, WIDTH)
        assert not whole
        near(model(long), twin(long))
        assert whole == [False]
        twin, model = converted(build, tile=4)
        x = tokens()
        near(model(x), twin(x))
        assert whole == [False]


class Stack(nn.Sequential):
    """What somebody else relies on."""

    @property
    def depth(self) -> int:
        return len(self)


@pytest.mark.parametrize("stack", [Stack, lambda block: nn.Sequential(block, nn.Identity())])
def test_other_sequences_stay_as_they_are(stack) -> None:
    model = stack(torchvision_block())
    kind = type(model)
    folded(model, sb.SupermaskConfig(linear=sb.TileSparsity(0.5, 8)))
    sb.to_bsr(model)
    assert type(model) is kind
    assert type(model[0]) is ResidualEncoderBlock


@builds
def test_what_is_replaced_meanwhile_lives_until_it_is_read(build, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = converted(build)
    x, run = tokens(), cpu.encoder

    def replace(*args):
        """As another thread may, between preparing and running."""
        sizes = []
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter + 1))
                sizes.append(parameter.shape)
        junk = [torch.full(size, 1e9) for size in sizes]
        y = run(*args)
        del junk
        return y

    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(cpu, "encoder", replace)
        assert torch.equal(model(x), expected)


@builds
def test_a_class_derived_from_a_block_is_called(build, whole: list[bool]) -> None:
    _, model = converted(build)
    x = tokens()

    class Louder(type(model[1])):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 100

    with torch.inference_mode():
        before = model[:1](x)
        model[0].__class__ = Louder
        near(model[:1](x), before + 100)
    assert whole == [True]


@builds
def test_a_block_that_was_compiled_is_called(build, whole: list[bool]) -> None:
    _, model = converted(build)
    seen = []
    torch.compiler.reset()
    with torch.inference_mode():
        expected = model(tokens())
        model[1].compile(backend=lambda graph, _: (seen.append(1), graph)[1])
        assert model(tokens()).shape == expected.shape
    assert seen
    assert whole == [True]


@builds
def test_one_block_that_is_left_to_its_steps_leaves_all(build, whole: list[bool]) -> None:
    _, model = converted(build)
    _, others = converted(build, tile=24)  # Which two heads of 16 do not cover.
    x = tokens()
    with torch.inference_mode():
        expected = others[0](model[0](x))
        model = EncoderSequential(model[0], others[0])
        near(model(x), expected)
    assert whole == [False]


@builds
def test_what_had_to_be_copied_lives_until_it_is_read(build) -> None:
    _, model = converted(build)
    x = tokens()
    with torch.no_grad():
        expected = model(x)
        for layer in model.modules():
            if isinstance(layer, BSRLinear):
                layer.bias.data = torch.stack([layer.bias, layer.bias], 1)[:, 0]
        for _ in range(10):
            near(model(x), expected)
            junk = [torch.full((size,), 1e9) for size in (WIDTH, 2 * WIDTH, 3 * WIDTH)]
            del junk


def test_dense_attention_is_called(whole: list[bool]) -> None:
    model = nn.Sequential(timm_block(), timm_block())
    folded(model, sb.SupermaskConfig(linear=sb.TileSparsity(0.5, 8), scope="mlp"))
    twin, x = copy.deepcopy(model), tokens()
    sb.to_bsr(model)
    assert type(model) is EncoderSequential
    assert type(model[0]) is ResidualBlock
    with torch.inference_mode():
        near(model(x), twin(x))
    assert not whole


@builds
def test_inference_compiles_whole(build, whole: list[bool]) -> None:
    _, model = converted(build)
    assert_compiles_whole(model, tokens())
    assert whole == [True]
