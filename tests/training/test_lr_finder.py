"""The range test, where the largest stable rate is known: SGD on a quadratic, 2 / curvature."""

import copy
import functools

import pytest
import torch
from torch import nn

from wus_ext.training import find_lr

CURVATURE = 8.0


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([3.0]))

    def forward(self, inputs):
        return self.x * inputs


def loss(output, targets):
    return 0.5 * CURVATURE * (output - targets).square().mean()


BATCH = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (torch.optim.SGD, 2 / CURVATURE),
        # Heavy ball: 2 (1 + momentum) / curvature
        (functools.partial(torch.optim.SGD, momentum=0.5), 3 / CURVATURE),
    ],
)
def test_it_stops_where_the_loss_runs_away_and_suggests_a_tenth(optimizer, limit):
    curve = find_lr(
        Quadratic(), [BATCH], loss=loss, optimizer=optimizer, lowest=1e-4, highest=1e4, steps=400
    )
    assert limit < curve.rates[-1] < 10 * limit
    lowest = min(range(len(curve.losses)), key=curve.losses.__getitem__)
    assert curve.suggestion == pytest.approx(curve.rates[lowest] / 10)
    assert limit / 100 < curve.suggestion < limit


def test_the_model_stays_what_it_is():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(3)]
    curve = find_lr(model, batches, steps=20, highest=0.1)
    assert len(curve.rates) == len(curve.losses) == 20
    assert curve.rates[-1] == pytest.approx(0.1)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_iterator_that_ends_ends_the_test():
    assert len(find_lr(Quadratic(), iter([BATCH] * 5), loss=loss).rates) == 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lowest": 0.0}, "0 < lowest < highest, got 0.0 and 1.0"),
        ({"lowest": 2.0}, "0 < lowest < highest, got 2.0 and 1.0"),
        ({"highest": float("inf")}, "0 < lowest < highest"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"batches": []}, "there is none"),
        ({"batches": [(torch.full((1,), float("nan")), torch.zeros(1))]}, "no finite loss"),
    ],
)
def test_what_cannot_work_is_refused(options, text):
    options = {"batches": [BATCH], "loss": loss, **options}
    with pytest.raises(ValueError, match=text):
        find_lr(Quadratic(), **options)
