"""Networks at random, in random settings, layouts, types and threads, against stock PyTorch.

What the fused kernels take is held against the same network in float64: it may be off by what
stock's own is and by what the transforms round more. Float64 runs stock's operators, and is held
against those. Other networks than the usual ones:

    WUS_EXAMPLES=5000 python -m pytest tests/engine/test_random.py
"""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wus_ext
from tests.engine.chains import strides
from tests.engine.networks import Activation, Network, build, either, networks
from wus_ext.engine import support

EXAMPLES = int(os.environ.get("WUS_EXAMPLES", 0))
SEED = 7


@dataclass(frozen=True)
class Step:
    window: str  # what stands still: nothing, weights, or all parameters
    mode: str
    data: str
    layout: str
    from_input: bool


@dataclass(frozen=True)
class Setting:
    dtype: str
    algo: str
    norm: str
    full: str
    fuse: bool
    skip_gamma: bool
    memory_budget: int | None
    channels_last: bool
    zero_biases: bool
    threads: int
    steps: tuple[Step, ...]


a_step = st.builds(
    Step,
    window=either("weights", "nothing", "all"),
    mode=either("training", "training", "evaluation", "no gradients"),
    data=either("dense", "sparse", "flat border"),
    layout=either("channels_last", "contiguous", "sliced", "transposed", "expanded"),
    from_input=either(True, True, False),
)
a_setting = st.builds(
    Setting,
    dtype=either("float32", "float32", "float32", "float64", "bfloat16", "autocast"),
    algo=either("auto", "f2", "f4", "direct"),
    norm=either("batch", "frozen"),
    full=either("fused", "stock"),
    fuse=either(True, True, True, False),
    skip_gamma=either(True, True, False),
    memory_budget=either(None, None, 0, 100_000),
    channels_last=st.booleans(),
    zero_biases=st.booleans(),
    threads=either(1, 2, 3),
    steps=st.lists(a_step, min_size=1, max_size=3).map(tuple),
).filter(lambda s: (s.fuse or s.full == "stock") and (s.skip_gamma or s.norm == "batch"))

TYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}


def draw_image(shape: tuple[int, ...], step: Step, seed: int, device: torch.device) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(shape, device=device)
    if step.data == "sparse":
        x = x * (torch.rand(shape[0], 1, *shape[2:], device=device) < 0.1)
    elif step.data == "flat border":
        x[:, :, : shape[2] // 2] = x[..., 2 * shape[3] // 3 :] = 0
    if step.layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if step.layout == "sliced":
        return torch.stack([x, x], -1).flatten(3)[..., ::2]
    if step.layout == "transposed":
        return x.mT.contiguous().mT
    return x[:1].expand_as(x) if step.layout == "expanded" else x


class Slack:
    """How near a network's values come to where a slope jumps, in parts of their size."""

    def __init__(self, model: nn.Module) -> None:
        self.least = float("inf")
        for module in model.modules():
            if isinstance(module, Activation):
                module.register_forward_pre_hook(self.activation)
            elif isinstance(module, nn.MaxPool2d):
                module.register_forward_pre_hook(self.pool)

    def note(self, distances: Tensor, values: Tensor) -> None:
        """Exact zeros are the same in every type."""
        distances = distances[distances > 0]
        if len(distances):
            self.least = min(self.least, (distances.min() / values.square().mean().sqrt()).item())

    def activation(self, module: Activation, given: tuple[Tensor]) -> None:
        for kink in module.kinks:
            self.note((given[0] - kink).abs(), given[0])

    def pool(self, module: nn.MaxPool2d, given: tuple[Tensor]) -> None:
        k, s, p = module.kernel_size, module.stride, module.padding
        padded = F.pad(given[0], (p, p + k, p, p + k), value=-1e9)
        best = padded.unfold(2, k, s).unfold(3, k, s).flatten(-2).topk(2).values
        first, second = best.unbind(-1)
        if ((first == second) & (first != 0)).any():  # which the transforms may tell apart
            self.least = 0.0
        self.note(first - second, given[0])


@dataclass
class Result:
    output: Tensor
    output_strides: tuple[int, ...]
    input_strides: tuple[int, ...] | None  # of the gradient that the network hands back
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def run(model: nn.Module, image: Tensor, step: Step, frozen: bool = False) -> Result:
    """One step, with random numbers of its own, the same ones every time.

    Args:
        frozen: whether batch norm's running statistics are used and stand still.
    """
    model.zero_grad()
    model.train(step.mode == "training")
    for module in model.modules():
        if frozen and isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.eval()
    handed_back: list[Tensor] = []
    image = image.detach().requires_grad_(step.from_input)
    torch.manual_seed(SEED)
    with torch.set_grad_enabled(step.mode != "no gradients"):
        if image.requires_grad:
            image.register_hook(handed_back.append)
        output = model(image)
    if output.requires_grad:
        torch.manual_seed(SEED)
        output.backward(torch.randn(output.shape).to(output))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if handed_back:
        gradients["input"] = handed_back[0]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    back = strides(handed_back[0]) if handed_back else None
    return Result(output.detach(), strides(output), back, gradients, buffers)


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def with_masks(
    model: nn.Module, image: Tensor, step: Step, frozen: bool
) -> tuple[Result, list[Tensor]]:
    """A step, and what its dropouts multiply by."""
    masks: list[Tensor] = []
    for dropout in dropouts(model):
        dropout.register_forward_pre_hook(lambda _, given: masks.append(torch.empty_like(given[0])))
    result = run(model, image, step, frozen)
    torch.manual_seed(SEED)
    for dropout, mask in zip(dropouts(model), masks, strict=True):
        mask.bernoulli_(1 - dropout.p).div_(1 - dropout.p)
    return result, masks


def in_float64(
    model: nn.Module, image: Tensor, step: Step, frozen: bool, masks: list[Tensor]
) -> tuple[Result, float]:
    """The step as it should be, and how far its values keep from where slopes jump."""
    model = copy.deepcopy(model).double()
    for dropout, mask in zip(dropouts(model), masks, strict=True):
        dropout.register_forward_hook(
            lambda module, given, output, mask=mask: given[0] * mask if module.training else output
        )
    slack = Slack(model)
    return run(model, image.double(), step, frozen), slack.least


def trained(name: str, window: str, skip_gamma: bool) -> bool:
    """Whether a parameter, or the input, gets a gradient."""
    if window == "nothing" or name == "input":
        return True
    bias = name.endswith("bias") or (not skip_gamma and "norm" in name)
    return bias and window == "weights"


def same(actual: Result, expected: Result) -> None:
    assert torch.equal(actual.output, expected.output)
    for kind in ("gradients", "buffers"):
        mine, theirs = getattr(actual, kind), getattr(expected, kind)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (value is None) == (mine[name] is None), name
            assert value is None or torch.equal(mine[name], value), name


def near(actual: Result, stock: Result, exact: Result, setting: Setting, window: str) -> None:
    """Ours is as near as stock's, or nearly."""
    more, relative = {
        "float32": (60, 3e-5), "float64": (60, 1e-12), "bfloat16": (8, 3e-2), "autocast": (8, 3e-2)
    }[setting.dtype]  # fmt: skip

    def check(name: str, mine: Tensor, theirs: Tensor, true: Tensor, scale: Tensor) -> None:
        assert mine.shape == true.shape
        error, allowed = (mine - true).norm(), (theirs - true).norm()
        bound = more * allowed + relative * (true.norm() + 0.03 * scale)
        assert error <= bound, (
            f"{name}: error {error:.1e}, stock's {allowed:.1e}, of {true.norm():.1e}"
        )

    check("output", actual.output, stock.output, exact.output, exact.output.norm())
    for name, true in exact.buffers.items():
        mine, theirs = actual.buffers[name], stock.buffers[name]
        check(name, *(buffer.double() for buffer in (mine, theirs, true)), true.new_zeros(()))
    wanted = {
        name: gradient
        for name, gradient in exact.gradients.items()
        if gradient is not None and trained(name, window, setting.skip_gamma)
    }
    assert wanted.keys() == {name for name, g in actual.gradients.items() if g is not None}
    for name, true in wanted.items():
        others = [g.norm() for n, g in wanted.items() if (n == "input") == (name == "input")]
        check(name, actual.gradients[name], stock.gradients[name], true, torch.stack(others).max())


def unsound(model: nn.Module, setting: Setting) -> set[str]:
    """Gradients that stock does not give twice alike: it reads memory that nobody wrote.

    These are convolutions' weight gradients in bfloat16, of small maps, on the CPU.
    """
    if setting.dtype in ("float32", "float64") or device_of(model).type != "cpu":
        return set()
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }


def sound(stock: Result, exact: Result) -> bool:
    """Whether stock's 16 bits are what they should be, but for rounding.

    The output of a convolution of 3x3 and stride 2 on a map of two columns, in bfloat16, is not: on
    processors with AMX it holds what nobody wrote.
    """
    pairs = [(stock.output, exact.output)]
    if "input" in stock.gradients:
        pairs.append((stock.gradients["input"], exact.gradients["input"]))
    return all((mine - true).norm() <= 0.2 * true.norm() for mine, true in pairs)


def takes(setting: Setting, device: torch.device) -> bool:
    """Whether the fused kernels run, and not stock's operators."""
    dtype = torch.bfloat16 if setting.dtype == "autocast" else getattr(torch, setting.dtype)
    return dtype in support.TYPES[device.type]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def check_step(ours: nn.Module, base: nn.Module, shape, setting: Setting, step: Step) -> None:
    """A step of `ours`, whose parameters and buffers `base` has, against stock PyTorch's.

    In 16 bits a ReLU of some ten features may pass what it should not, ours as well as stock's: one
    image of three has to agree there, which no systematic error survives.
    """
    more = 2 if setting.dtype in ("bfloat16", "autocast") else 0
    spares = [copy.deepcopy(ours) for _ in range(more)]
    for number, model in enumerate([ours, *spares]):
        try:
            return check_image(model, base, shape, setting, step, 10 * number)
        except AssertionError:
            if number == more:
                raise


def check_image(
    ours: nn.Module, base: nn.Module, shape, setting: Setting, step: Step, first_seed: int
) -> None:
    frozen = setting.norm == "frozen" and step.window != "nothing"
    dtype = TYPES.get(setting.dtype, torch.float32)
    device = device_of(base)
    context = (
        torch.autocast(device.type, torch.bfloat16)
        if setting.dtype == "autocast"
        else contextlib.nullcontext()
    )
    with context:
        for seed in range(first_seed, first_seed + 10):
            image = draw_image(shape, step, seed, device).to(dtype)
            expected, masks = with_masks(copy.deepcopy(base), image, step, frozen)
            exact, slack = in_float64(base, image, step, frozen, masks)
            if device.type == "cpu" and setting.dtype in ("bfloat16", "autocast"):
                assume(sound(expected, exact))
            if not takes(setting, device):
                exact = expected
                break
            if slack > 1e-4 or step.mode == "no gradients" or setting.dtype != "float32":
                break
        else:
            assume(False)
        ours.zero_grad()
        wus_ext.set_skip(ours, step.window != "nothing", skip_biases=step.window == "all")
        actual = run(ours, image, step)
    for name in unsound(base, setting):
        for result in (actual, expected, exact):
            result.gradients.pop(name, None)
    assert actual.output_strides == expected.output_strides
    # What a residual sum hands back of an image that is not in channels_last is contiguous.
    channels_last = image.is_contiguous(memory_format=torch.channels_last)
    accepted = expected.input_strides, strides(image if channels_last else image.contiguous())
    assert actual.input_strides in accepted
    ours_are_stock = setting.full == "stock" or not setting.fuse
    repeats = device.type == "cpu"  # some of stock's kernels add up by chance on a GPU
    if step.window == "nothing" and ours_are_stock and repeats:
        same(actual, expected)
    else:
        near(actual, expected, exact, setting, step.window)


def examples(count: int) -> settings:
    """So many, always the same ones, unless others are asked for."""
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@examples(500)
@given(networks(), a_setting)
@pytest.mark.filterwarnings("ignore:convert. Sequential has no bias")
def test_steps(network: Network, setting: Setting):
    check_steps(network, setting, "cpu")


def check_steps(network: Network, setting: Setting, device: str) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(SEED)
    base = build(network)
    if setting.zero_biases:
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
    if setting.channels_last:
        base = base.to(memory_format=torch.channels_last)
    base = base.to(device, TYPES.get(setting.dtype, torch.float32))
    ours = wus_ext.convert(
        copy.deepcopy(base),
        algo=setting.algo,
        norm=setting.norm,
        full=setting.full,
        fuse=setting.fuse,
        skip_gamma=setting.skip_gamma,
        memory_budget=setting.memory_budget,
    )
    torch.set_num_threads(setting.threads)
    try:
        for step in setting.steps:
            check_step(ours, base, network.input, setting, step)
            with torch.no_grad():
                for parameter in ours.parameters():
                    if parameter.grad is not None:
                        parameter.mul_(1.1)
            base.load_state_dict(ours.state_dict())
    finally:
        torch.set_num_threads(threads)
