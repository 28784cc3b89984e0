"""Which gradients a window drops: none where nothing trains, and never in silence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wus_ext


def network(outputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, outputs),
    )  # fmt: skip


def pair(**settings) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = network()
    return stock, wus_ext.convert(copy.deepcopy(stock), **settings)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, 3, 6, 6), torch.randint(3, (4,))) for _ in range(count)]


def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One signed step along the gradient of the images."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return (x + 0.1 * grad.sign()).detach()


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_gradients(model: nn.Module, stock: nn.Module) -> None:
    for name, grad in gradients(stock).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-4, atol=1e-5)


settings = pytest.mark.parametrize("full", ["stock", "fused"])


@settings
def test_a_block_that_trains_nothing_keeps_every_gradient(full):
    _, model = pair(full=full)
    (x, y), _ = batches(2)
    F.cross_entropy(model(x), y).backward()
    before = gradients(model)
    values = {name: grad.clone() for name, grad in before.items()}
    with wus_ext.skip_weight_updates(model, skip_biases=True):
        image = x.clone().requires_grad_()
        F.cross_entropy(model(image), y).backward()
    assert image.grad.abs().sum() > 0
    for name, grad in gradients(model).items():
        assert grad is before[name]
        assert torch.equal(grad, values[name])


@settings
def test_micro_batches_around_input_gradients(full):
    stock, model = pair(full=full)
    for x, y in batches(3):
        F.cross_entropy(stock(x), y).backward()
        F.cross_entropy(model(x), y).backward()
        with wus_ext.skip_weight_updates(model, skip_biases=True):
            attack(model.eval(), x, y)
            model.train()
    assert_equal_gradients(model, stock)


@settings
def test_adversarial_training_with_accumulation(full):
    stock, model = pair(full=full, algo="direct")
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (stock, model)]
    for step, (x, y) in enumerate(batches(8)):
        for m in (stock, model):
            m.eval()
        with wus_ext.skip_weight_updates(model, skip_biases=True):
            found = attack(model, x, y)
        torch.testing.assert_close(found, attack(stock, x, y))
        for m in (stock, model):
            F.cross_entropy(m.train()(found), y).backward()
        if step % 2:
            assert_equal_gradients(model, stock)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


@settings
def test_a_gan_that_steps_its_critic_after_the_generators_pass(full):
    torch.manual_seed(0)
    stock = nn.ModuleDict({"maker": nn.Linear(5, 3 * 36), "critic": network(1)})
    ours = copy.deepcopy(stock)
    wus_ext.convert(ours["critic"], full=full, algo="direct")
    start = copy.deepcopy(stock.state_dict())

    def play(nets: nn.ModuleDict, frozen) -> None:
        maker, critic = nets["maker"], nets["critic"]
        step_maker = torch.optim.SGD(maker.parameters(), 0.05)
        step_critic = torch.optim.SGD(critic.parameters(), 0.05)
        torch.manual_seed(1)
        for _ in range(3):
            step_critic.zero_grad()
            step_maker.zero_grad()
            real, noise = torch.randn(4, 3, 6, 6), torch.randn(4, 5)
            made = maker(noise).view(4, 3, 6, 6)
            (critic(made.detach()) - critic(real)).mean().backward()
            with frozen(critic):
                (-critic(made)).mean().backward()
            step_maker.step()
            step_critic.step()

    class Frozen:
        """Stock's own way."""

        def __init__(self, critic):
            self.critic = critic

        def __enter__(self):
            self.critic.requires_grad_(False)

        def __exit__(self, *_):
            self.critic.requires_grad_(True)

    play(stock, Frozen)
    play(ours, lambda critic: wus_ext.skip_weight_updates(critic, skip_biases=True))
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    moved = stock["critic"][4].weight - start["critic.4.weight"]
    assert moved.abs().max() > 1e-3


def test_a_window_keeps_them_as_a_block_does():
    _, model = pair()
    ((x, y),) = batches(1)
    F.cross_entropy(model(x), y).backward()
    before = gradients(model)
    wus_ext.set_skip(model, True, skip_biases=True)
    assert gradients(model) == before
    wus_ext.set_skip(model, False)
    assert gradients(model) == before


def test_parameters_that_never_train_do_not_count():
    _, model = pair()
    ((x, y),) = batches(1)
    F.cross_entropy(model(x), y).backward()
    for parameter in model[4].parameters():
        parameter.requires_grad_(False)
    before = gradients(model)
    wus_ext.set_skip(model, True, skip_biases=True)
    assert gradients(model) == before


def test_biases_that_train_after_all():
    """The window of input gradients becomes one in which an optimizer steps."""
    _, model = pair()
    ((x, y),) = batches(1)
    F.cross_entropy(model(x), y).backward()
    wus_ext.set_skip(model, True, skip_biases=True)
    with pytest.warns(UserWarning, match=r"gradients of 0\.weight, 1\.weight, 4\.weight"):
        wus_ext.set_skip(model, True)
    kept = {name for name, grad in gradients(model).items() if grad is not None}
    assert kept == {"0.bias", "1.bias", "4.bias"}


def test_what_a_window_drops_it_names_once():
    _, model = pair()
    ((x, y),) = batches(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wus_ext.set_skip(model, True)  # nothing to drop, nothing to say
        wus_ext.set_skip(model, False)
        F.cross_entropy(model(x), y).backward()
        with wus_ext.skip_weight_updates(model, skip_biases=True):
            pass
    message = r"drops the gradients of 0\.weight, 0\.bias(?!.*1\.)"
    with pytest.warns(UserWarning, match=message):
        wus_ext.set_skip(model, True, layers="0", skip_biases=True)
    assert model[0].weight.grad is None
    assert model[0].bias.grad is None
    assert model[4].weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wus_ext.set_skip(model, True)
    assert model[4].weight.grad is None

    _, other = pair()
    F.cross_entropy(other(x), y).backward()
    wus_ext.set_skip(wus_ext.convert(nn.Linear(2, 2)), True)
    with (
        pytest.warns(UserWarning, match=r"0\.weight, 1\.weight, 4\.weight,"),
        wus_ext.skip_weight_updates(other),
    ):
        pass


def test_many_names_are_shortened():
    model = wus_ext.convert(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]))
    model(torch.randn(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"0\.weight, 1\.weight, 2\.weight and 3 others, which"):
        wus_ext.set_skip(model, True)
