"""torch.compile and torch.export of converted models: one graph for each kind of step."""

from __future__ import annotations

import copy
import io
import shutil

import pytest
import torch
from torch import nn

import wus_ext
from tests.cases import assert_near
from tests.conversion.skipping import Net, images, with_gradient
from wus_ext.profiling.saved import saving

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that knows how many graphs it was given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs = 0
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


def plain() -> nn.Sequential:
    """Drop-in layers only."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )


def volumes() -> nn.Sequential:
    """Convolutions of every rank, and norms."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.GroupNorm(2, 4),
        nn.Unflatten(1, (2, 2)),
        nn.Conv3d(2, 4, 2, stride=2),
        nn.Flatten(2),
        nn.Conv1d(4, 2, 3),
        nn.ConvTranspose1d(2, 2, 2),
        nn.LayerNorm(35),
        nn.RMSNorm(35),
    )


def torchvision_resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=5)


NETWORKS = {
    "alexnet": lambda: wus_ext.models.alexnet(num_classes=5),
    "vgg11": lambda: wus_ext.models.vgg11(num_classes=5),
    "vgg16_bn": lambda: wus_ext.models.vgg16(batch_norm=True, num_classes=5),
    "resnet18": lambda: wus_ext.models.resnet18(num_classes=5),
    "torchvision_resnet18": torchvision_resnet18,
}


def backward(model: nn.Module, x: torch.Tensor, grad_output=None):
    """Output, upstream gradient and input gradient of a step with its own random numbers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    output = model(x)
    if grad_output is None:
        grad_output = torch.randn_like(output)
    output.backward(grad_output)
    return output.detach(), grad_output, x.grad


def check_step(model: nn.Module, compiled: nn.Module, eager: nn.Module, x: torch.Tensor) -> None:
    """A compiled step equals the same step run layer by layer."""
    expected, grad_output, wanted = backward(eager, x)
    output, _, got = backward(compiled, x, grad_output)
    assert_near(output, expected, "output")
    assert_near(got, wanted, "input gradient")
    assert with_gradient(model) == with_gradient(eager)
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, eager.get_parameter(name).grad, name)


def made(make, **options) -> tuple[nn.Module, nn.Module, nn.Module, Counting]:
    """A model, the model compiled, its eager twin, and the backend."""
    model = make()
    eager = wus_ext.convert(copy.deepcopy(model), fuse=False)
    counting = Counting(**options)
    wus_ext.convert(model)
    return model, torch.compile(model, backend=counting, fullgraph=True), eager, counting


def is_first(name: str, _: nn.Module) -> bool:
    return name in ("0", "conv")


def only_first(model: nn.Module) -> None:
    wus_ext.set_skip(model, False)
    wus_ext.set_skip(model, True, layers=is_first)


def all_but_first(model: nn.Module) -> None:
    wus_ext.set_skip(model, True)
    wus_ext.set_skip(model, False, layers=is_first)


KINDS = {
    "full": lambda model: wus_ext.set_skip(model, False),
    "skip": lambda model: wus_ext.set_skip(model, True),
    "input_only": lambda model: wus_ext.set_skip(model, True, skip_biases=True),
    "only_first": only_first,
    "all_but_first": all_but_first,
}


@pytest.mark.parametrize("make", [plain, volumes, Net])
def test_each_kind_of_step_is_one_graph(make):
    model, compiled, eager, counting = made(make)
    check_step(model, compiled, eager, images())  # before anything was ever set
    for round in range(3):
        for kind in KINDS if round < 2 else reversed(KINDS):
            for switched in (compiled, eager):
                KINDS[kind](switched)
            with torch.compiler.set_stance("default" if round == 0 else "fail_on_recompile"):
                check_step(model, compiled, eager, images())
    assert counting.graphs == len(KINDS)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compile_once_for_full_and_once_for_skip_steps(name):
    model, compiled, eager, counting = made(NETWORKS[name])
    x = torch.randn(2, 3, 32, 32)
    for norm in (*model.modules(), *eager.modules()):
        if isinstance(norm, nn.BatchNorm2d):  # two images at one pixel normalise to signs
            norm.eval()
    for count, skip in enumerate([False, True, False, True]):
        for switched in (compiled, eager):
            wus_ext.set_skip(switched, skip)
        with torch.compiler.set_stance("default" if count < 2 else "fail_on_recompile"):
            check_step(model, compiled, eager, x)
    assert counting.graphs == 2


@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_breaks(kind):
    model = wus_ext.convert(Net())
    KINDS[kind](model)
    explained = torch._dynamo.explain(model)(images())
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_saves_less_in_a_skip_step():
    model, compiled, eager, counting = made(plain, backend="inductor")
    saved = []
    for skip in (False, True, False, True):
        for switched in (compiled, eager):
            wus_ext.set_skip(switched, skip)
        with torch.compiler.set_stance("default" if len(saved) < 2 else "fail_on_recompile"):
            check_step(model, compiled, eager, images())
            saved.append(saved_bytes(model, compiled))
    assert counting.graphs == 2
    assert saved[1] == saved[3] < saved[2] == saved[0]


def saved_bytes(model: nn.Module, compiled: nn.Module) -> int:
    with saving(model.parameters()) as saved:
        output = compiled(images().requires_grad_())
    assert output.requires_grad
    return saved()


def operators(exported: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("skip", [False, True], ids=["full", "skip"])
@pytest.mark.parametrize("make", [plain, Net])
def test_export(make, skip, strict):
    """What is exported is the step that the model is in; a full one needs stock PyTorch only."""
    model = wus_ext.convert(make()).eval()
    wus_ext.set_skip(model, skip)
    parameters = [id(parameter) for parameter in model.parameters()]
    exported = torch.export.export(model, (images(),), strict=strict)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert any("wus" in name for name in operators(exported)) == skip
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    x = images()
    for program in (exported, torch.export.load(file)):
        assert_near(program.module()(x), wus_ext.convert(model, fuse=False)(x), "output")
    assert exported.state_dict.keys() == model.state_dict().keys()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_an_exported_full_step_is_stock_bit_for_bit(strict):
    model = plain().eval()
    converted = wus_ext.convert(copy.deepcopy(model))
    programs = [torch.export.export(m, (images(),), strict=strict) for m in (model, converted)]
    stock, full = (program.module() for program in programs)
    assert operators(programs[0]) == operators(programs[1])
    x = images()
    assert torch.equal(stock(x), full(x))
