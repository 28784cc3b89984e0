"""When a new kernel replaces the trusted way: only where it exists, is right and is faster."""

from __future__ import annotations

import pytest
import torch

from wus_ext.engine.gpu import tuning


class Ways:
    """A candidate and a trusted way that take the times given and count their calls."""

    def __init__(self, ours=1.0, theirs=2.0, exists=True, result=None, trusted=None):
        self.calls, self.asked, self._exists = [], 0, exists
        self.trusted_result = torch.ones(8) if trusted is None else trusted
        self.result = self.trusted_result if result is None else result
        times = {"candidate": ours, "trusted": theirs}
        self.choices = tuning.Choices(lambda way: times[way.__name__])

    def exists(self):
        self.asked += 1
        if isinstance(self._exists, Exception):
            raise self._exists
        return self._exists

    def candidate(self):
        self.calls.append("candidate")
        if isinstance(self.result, Exception):
            raise self.result
        return (self.result,)

    def trusted(self):
        self.calls.append("trusted")
        return (self.trusted_result,)

    def prefer(self, key="shape"):
        candidate = tuning.Candidate(self.exists, self.candidate)
        return self.choices.best(key, self.trusted, [candidate]) == 0


@pytest.mark.parametrize(
    ("settings", "preferred"),
    [
        ({}, True),
        ({"ours": 3.0}, False),
        ({"ours": 2.0}, False),
        ({"exists": False}, False),
        ({"exists": NotImplementedError("not built")}, False),
        ({"result": torch.full((8,), 1.001)}, False),
        ({"result": torch.full((8,), 1 + 1e-6)}, True),
        ({"result": torch.full((8,), float("nan"))}, False),
        ({"result": RuntimeError("no kernel image")}, False),
    ],
    ids=["faster", "slower", "as_fast", "missing", "not_built", "wrong", "rounded", "nan", "fails"],
)
def test_preferred(settings, preferred):
    ways = Ways(**settings)
    assert ways.prefer() is preferred
    calls = list(ways.calls)
    assert ways.prefer() is preferred
    assert ways.calls == calls, "found out once"
    assert ways.asked == 1
    if ways._exists is not True:
        assert not calls


def test_each_problem_is_tried():
    ways = Ways()
    assert ways.prefer("one")
    ways._exists = False
    assert not ways.prefer("another")
    assert ways.prefer("one")


def test_low_precision_may_differ_by_its_rounding():
    ones = torch.ones(8, dtype=torch.bfloat16)
    assert Ways(trusted=ones, result=ones * 1.02).prefer()
    assert not Ways(trusted=ones, result=ones * 1.2).prefer()


def test_what_is_not_finite_is_tried_again():
    ways = Ways(trusted=torch.full((8,), float("inf")))
    assert not ways.prefer()
    ways.trusted_result = ways.result = torch.ones(8)
    assert ways.prefer()


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    ways = Ways()
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert not ways.prefer()
    assert not ways.asked
    assert not ways.calls
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    assert ways.prefer()
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert ways.prefer(), "what is known is used"


@pytest.mark.parametrize(
    ("times", "missing", "wrong", "best"),
    [
        ((1.0, 2.0), None, None, 0),
        ((2.0, 1.0), None, None, 1),
        ((1.0, 2.0), 0, None, 1),
        ((1.0, 2.0), None, 0, 1),
        ((4.0, 5.0), None, None, None),
    ],
)
def test_the_best_of_two(times, missing, wrong, best):
    right = (torch.ones(8),)

    def way(i):
        return lambda: (torch.zeros(8),) if i == wrong else right

    ways = [way(0), way(1)]

    def trusted():
        return right

    seconds = dict(zip([*ways, trusted], [*times, 3.0], strict=True))
    candidates = [tuning.Candidate(lambda i=i: i != missing, run) for i, run in enumerate(ways)]
    assert tuning.Choices(seconds.__getitem__).best("shape", trusted, candidates) == best
