"""When steps are recorded, replayed and recorded anew; on a GPU, that weights come out alike."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from wus_ext.training import ConfigError, TrainConfig, Trainer
from wus_ext.training.graphs import StepGraphs
from wus_ext.training.loop import train_epoch

from . import tiny


class Recorder:
    """A graph that keeps a diary; as a real one it runs nothing while it records."""

    diary: list = []  # noqa: RUF012

    def __init__(self, step):
        self.step = step
        self.diary.append("record")

    def replay(self):
        self.diary.append("replay")
        return self.step()

    @classmethod
    def warm_up(cls, step):
        cls.diary.append("run")
        return step()


@pytest.fixture
def diary():
    Recorder.diary.clear()
    return Recorder.diary


def batches(count, size=4):
    return [(torch.full((size, 2), float(i)), torch.arange(size)) for i in range(count)]


def test_steps_are_warmed_up_recorded_once_and_replayed_on_new_data(diary):
    run = StepGraphs(lambda images, labels: images.sum() + labels.sum(), graph=Recorder)
    results = [run(*batch).item() for batch in batches(6)]
    assert diary == ["run"] * 3 + ["record", "replay", "replay", "replay"]
    assert results == [8.0 * i + 6 for i in range(6)]


def test_the_given_tensors_are_left_alone(diary):
    run = StepGraphs(lambda images, labels: images.add_(1), graph=Recorder)
    for images, labels in batches(3):
        run(images, labels)
    images, labels = batches(1)[0]
    run(images, labels)
    assert not images.any()


def test_an_odd_batch_is_run(diary):
    run = StepGraphs(lambda images, labels: None, graph=Recorder)
    for batch in [*batches(5), *batches(1, size=3), *batches(1)]:
        run(*batch)
    assert diary == ["run"] * 3 + ["record", "replay", "replay", "run", "replay"]


def test_each_kind_of_step_has_a_graph_and_each_window_a_new_one(diary):
    state = {"skip": False}
    run = StepGraphs(lambda images, labels: None, skipping=lambda: state["skip"], graph=Recorder)

    def phase(skip, steps):
        diary.clear()
        state["skip"] = skip
        for batch in batches(steps):
            run(*batch)
        return "".join(word[2] for word in diary)  # ru-n, re-c-ord, re-p-lay

    fresh = "nnncpp"
    assert phase(False, 5) == fresh
    assert phase(True, 5) == fresh
    assert phase(True, 2) == "pp"
    assert phase(False, 2) == "pp"
    assert phase(True, 5) == fresh


def test_a_full_step_within_a_window_is_recorded_and_not_mixed_up(diary, monkeypatch):
    """As with ``full_every=5``; each run of skip steps is recorded anew."""
    monkeypatch.setattr("wus_ext.training.loop.StepGraphs", partial(StepGraphs, graph=Recorder))
    model = torch.nn.Linear(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_epoch(
        model,
        batches(25),
        optimizer,
        device=torch.device("cpu"),
        cuda_graphs=True,
        begin=lambda step: (step + 1) % 5 != 0,
    )
    skips, warm_up, recorded, full = "nnncp", "n", "cp", "p"  # ru-n, re-c-ord, re-p-lay
    expected = (skips + warm_up) * 3 + skips + recorded + skips + full
    assert "".join(word[2] for word in diary) == expected
    assert result.skipped == 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cpu"}, "cuda_graphs needs a GPU, and the device is cpu"),
        pytest.param(
            {"amp": "fp16", "device": "cuda"},
            "cuda_graphs needs amp 'off' or 'bf16'",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(cuda_graphs=True, **settings).validate()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("wus_ext.distributed.processes.count", lambda: 2)
    with pytest.raises(ConfigError, match="cuda_graphs needs a single process"):
        TrainConfig(cuda_graphs=True).validate()


def test_steps_run_on_the_device_of_their_images(diary, monkeypatch):
    entered = []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    run = StepGraphs(lambda images, labels: diary.append("step"), graph=Recorder)
    images, labels = batches(1)[0]
    run(images, labels)
    assert entered[0] is images
    assert entered[1:] == [None]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_recorded_on_another_device_than_the_current_one():
    run = StepGraphs(lambda images, labels: images * 2)
    for i in range(5):
        images = torch.full((4, 2), float(i), device="cuda:1")
        assert run(images, torch.arange(4, device="cuda:1")).sum().item() == 16 * i


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "baseline"},
        {"method": "fused"},
        {"method": "wus"},
        {"method": "wus", "full": "fused"},
        {"full_every": 6, "bias_lr": 2.0},
    ],
    ids=["baseline", "fused", "wus", "wus, fused", "full steps within"],
)
def test_recorded_steps_train_as_others_on_cuda(settings):
    weights = []
    for cuda_graphs in (False, True):
        config = tiny.CONFIG.replace(device="cuda", cuda_graphs=cuda_graphs, **settings)
        run = Trainer(config, data=tiny.data(train=80, device="cuda"), build=tiny.build)
        run.run()
        weights.append(torch.cat([p.detach().flatten().cpu() for p in run.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
