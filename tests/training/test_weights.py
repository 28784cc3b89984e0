"""Weights to start from, in whatever file they come."""

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.training import ConfigError, DataError, Trainer
from wus_ext.training.weights import put_weights, read_weights

from . import tiny
from .tiny import trainer


def start(weights, **settings):
    return trainer(weights=str(weights), **settings)


@pytest.fixture
def there():
    torch.manual_seed(7)
    return tiny.build(2)


def same(run, there):
    mine, theirs = run.model.state_dict(), there.state_dict()
    return all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"model": {f"module._orig_mod.{n}": v for n, v in state.items()}},
    ],
    ids=["plain", "model", "state_dict", "parallel", "compiled"],
)
def test_any_usual_file(tmp_path, there, wrap):
    torch.save(wrap(there.state_dict()), tmp_path / "weights.pt")
    assert same(start(tmp_path / "weights.pt"), there)


def test_safetensors(tmp_path, there):
    library = pytest.importorskip("safetensors.torch")
    library.save_file(there.state_dict(), tmp_path / "weights.safetensors")
    assert same(start(tmp_path / "weights.safetensors"), there)
    (tmp_path / "weights.safetensors").write_text("no")
    with pytest.raises(DataError, match=r"weights\.safetensors is not readable"):
        read_weights(tmp_path / "weights.safetensors")


def test_the_folder_of_a_run(tmp_path):
    run = trainer(out=tmp_path / "run")
    run.run()
    best = tiny.build(2)
    best.load_state_dict(torch.load(tmp_path / "run/best.pt", weights_only=True)["model"])
    assert same(start(tmp_path / "run"), best)


def test_a_run_from_weights_resumes_without_their_file(tmp_path, there):
    torch.save(there.state_dict(), tmp_path / "weights.pt")
    whole = start(tmp_path / "weights.pt")
    whole.run()
    first = start(tmp_path / "weights.pt", out=tmp_path / "run")
    first.run_epoch()
    (tmp_path / "weights.pt").unlink()
    second = start(tmp_path / "weights.pt", out=tmp_path / "run", resume=True)
    second.run()
    assert same(second, whole.model)
    with pytest.raises(ConfigError, match=r"weights is .* there, None here"):
        trainer(out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "weights.pt is missing"),
        (b"no archive", "weights.pt is not a readable checkpoint"),
        ([1, 2], "weights.pt holds no weights"),
        ({}, "weights.pt holds no weights"),
        ({"epoch": 3, "name": "x"}, "holds no weights: expected the state_dict"),
        ({"fc.weight": torch.zeros(2, 3)}, r"is not of this network: it has no 0\.weight, 0\.bias"),
        (nn.Sequential(nn.Conv2d(3, 4, 5)).state_dict(), "it has no 4.weight, 4.bias"),
    ],
)
def test_what_is_no_file_of_weights_is_said_in_one_line(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(DataError, match=message) as caught:
        start(path, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_kernel_of_another_size_is_another_network(there):
    other = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), *list(there)[1:])
    with pytest.raises(DataError, match=r"0\.weight is \(4, 3, 5, 5\) there and \(4, 3, 3, 3\)"):
        put_weights(there, other.state_dict(), "there")


def test_a_converted_model_takes_them_too(there):
    model = wus_ext.convert(tiny.build(5))
    first = model[4].weight.clone()
    assert put_weights(model, there.state_dict(), "there") == ["4.weight", "4.bias"]
    assert torch.equal(model[0].weight, there[0].weight)
    assert torch.equal(model[4].weight, first)


def test_every_method_starts_from_them(tmp_path, there):
    torch.save(there.state_dict(), tmp_path / "weights.pt")
    for method in ("baseline", "fused", "wus"):
        assert same(start(tmp_path / "weights.pt", method=method), there)


def test_the_trainer_says_which(tmp_path, there):
    torch.save(there.state_dict(), tmp_path / "weights.pt")
    said = []

    class Said:
        say = said.append

    config = tiny.CONFIG.replace(weights=str(tmp_path / "weights.pt"))
    Trainer(config, data=tiny.data(), build=tiny.build, progress=Said)
    assert said == [f"weights: 4 of 4 tensors from {tmp_path / 'weights.pt'}"]
