"""``wus-ext evaluate`` and ``wus-ext export``: what became of a run."""

import json
import subprocess
import sys

import pytest
import torch

from wus_ext.cli import main
from wus_ext.training import DataError
from wus_ext.training.evaluation import Evaluation, confusion, evaluate_checkpoint, read_checkpoint
from wus_ext.training.runfolder import RunFolder

from . import tiny

OWN = """
from torch import nn

def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(64, classes),
    )
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains a network of one's own; returns the folder of the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)

    def run(*arguments):
        given = "train --model own.py:build --epochs 3 --batch-size 8 --lr 0.05 --out run"
        assert main([*given.split(), *arguments]) == 0
        return tmp_path / "run"

    return run


@pytest.fixture
def digits(train):
    return train("--limit-train", "200", "--limit-test", "100", "--validation", "0.2")


@pytest.fixture
def birds(train, photos):
    return train("--dataset", "folder", "--data-dir", str(photos), "--normalize", "half")


@pytest.mark.parametrize("part", ["test", "validation"])
@pytest.mark.parametrize("which", ["best", "last"])
def test_an_evaluation_gives_what_training_saw(digits, capsys, part, which):
    capsys.readouterr()
    assert main(["evaluate", str(digits), "--part", part, "--checkpoint", which]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    history = RunFolder(digits).history()
    epoch = torch.load(digits / f"{which}.pt", weights_only=True)["epoch"]
    record = history[epoch - 1]
    count = {"test": 100, "validation": 40}[part]
    assert first == f"run/{which}.pt, epoch {epoch}: {count} images of digits, {part}".replace(
        "run/", f"{digits}/"
    )
    assert second == (
        f"accuracy {record[f'{part}_accuracy']:.2f} %, loss {record[f'{part}_loss']:.4f}"
    )


def test_the_training_part_is_without_what_was_held_out(digits):
    _, data = evaluate_checkpoint(read_checkpoint(digits), part="train")
    assert data.about == "160 images of digits, train"


def test_another_folder_needs_only_the_part_that_is_looked_at(birds, photos, tmp_path, capsys):
    more = tmp_path / "more"
    (more / "test").mkdir(parents=True)
    (photos / "train/dog").rename(more / "test/dog")  # one class only
    capsys.readouterr()
    table = tmp_path / "confusion.csv"
    arguments = ["--data-dir", str(more), "--confusion", str(table), "--workers", "0"]
    assert main(["evaluate", str(birds), *arguments]) == 0
    assert "8 images of folder, test" in capsys.readouterr().out
    header, cat, dog = table.read_text().splitlines()
    assert header == "class,cat,dog"
    assert cat == "cat,0,0"
    assert sum(map(int, dog.split(",")[1:])) == 8


def test_images_are_normalised_as_in_training(birds):
    checkpoint = read_checkpoint(birds)
    assert (checkpoint.mean, checkpoint.std) == ([0.5] * 3, [0.5] * 3)
    _, data = evaluate_checkpoint(checkpoint, device="cpu")
    grey = torch.full((1, 3, 2, 2), 127.5)
    torch.testing.assert_close(data.normalize(grey), torch.zeros(1, 3, 2, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is missing"),
        (["run", "--worst", "-1"], "worst must be at least 0, got -1"),
        (["run", "--dataset", "folder", "--data-dir", "nowhere"], "nowhere has no test folder"),
        (["run", "--device", "cuda:99"], "not present"),
        (["run/metrics.csv"], "not a readable checkpoint"),
        (["run", "--confusion", "nowhere/x.csv"], "cannot write nowhere/x.csv"),
    ],
)
def test_bad_arguments_give_one_sentence(digits, capsys, arguments, message):
    capsys.readouterr()
    assert main(["evaluate", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_classes_that_the_run_does_not_know_are_named(birds, photos):
    checkpoint = read_checkpoint(birds)
    with pytest.raises(DataError, match=r"digits has 10 classes .*, the network knows 2 others"):
        evaluate_checkpoint(checkpoint, dataset="digits")
    (photos / "val/dog").rename(photos / "val/cow")
    with pytest.raises(DataError, match="classes that the run did not train: cow; it trained cat"):
        evaluate_checkpoint(checkpoint)


def test_the_last_validation_part_is_asked_for_in_vain(birds, capsys):
    assert main(["evaluate", str(birds), "--part", "validation"]) == 2
    assert "the run held no images out" in capsys.readouterr().err


def test_a_run_whose_images_have_other_classes_does_not_resume(birds, photos, capsys):
    for part in ("train", "val"):
        (photos / part / "dog").rename(photos / part / "cow")
    assert main(["train", "--resume", "--out", str(birds)]) == 2
    error = capsys.readouterr().err
    assert "its classes are cat, dog, those of the images here cat, cow" in error


# Counting


def test_counts_and_the_worst_classes():
    scores = torch.eye(3)[torch.tensor([0, 0, 1, 1, 1, 2])] * 9
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    batches = [(scores[:4], labels[:4]), (scores[4:], labels[4:])]
    found = confusion(torch.nn.Identity(), batches, ["a", "b", "cc"], device=torch.device("cpu"))
    assert found.counts.tolist() == [[1, 0, 0], [1, 1, 0], [0, 2, 1]]
    assert found.accuracy == 50.0
    expected = torch.nn.functional.cross_entropy(scores, labels).item()
    assert found.loss == pytest.approx(expected)
    assert found.worst(5) == ["cc   33.3 % of 3: 2 taken for b", "b    50.0 % of 2: 1 taken for a"]
    assert found.worst(0) == []


def test_a_class_is_taken_for_many():
    counts = torch.tensor([[0, 1, 3, 2, 1]] + [[0] * 5] * 4)
    (line,) = Evaluation(0.0, counts, list("abcde")).worst(9)
    assert line == "a    0.0 % of 7: 3 taken for c, 2 for d, 1 for b"


# Export

LOAD = """
import sys
sys.modules["wus_ext"] = None
import torch, own
if "safetensors" in {load!r}:
    import safetensors.torch
model = own.build(10)
weights = {load}
model.load_state_dict(weights)
assert all(type(m).__module__.startswith("torch") for m in model.modules())
torch.save(model.eval()(torch.load("images.pt")), "scores.pt")
"""


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("model.safetensors", "safetensors.torch.load_file('model.safetensors')"),
        ("model.pt", "torch.load('model.pt', weights_only=True)"),
    ],
)
def test_weights_load_without_this_package(digits, tmp_path, capsys, name, load):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    capsys.readouterr()
    assert main(["export", str(digits), "--out", name]) == 0
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{name}: 9 tensors, 0.0 MiB, of epoch ")
    assert second.startswith("load: model = build(10); model.load_state_dict(")
    assert third.startswith("images: RGB from 0 to 1, 3x32x32, less mean (0.")
    assert fourth == "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, "images.pt")
    subprocess.run([sys.executable, "-c", LOAD.format(load=load)], check=True, cwd=tmp_path)
    expected = read_checkpoint(digits).model(images)
    torch.testing.assert_close(torch.load("scores.pt"), expected)


def test_safetensors_know_what_they_are(birds):
    library = pytest.importorskip("safetensors")
    assert main(["export", str(birds), "--checkpoint", "last"]) == 0
    with library.safe_open(birds / "model.safetensors", "pt") as file:
        about = file.metadata()
    assert about["model"] == "own.py:build"
    assert json.loads(about["classes"]) == ["cat", "dog"]
    assert json.loads(about["mean"]) == [0.5] * 3
    assert json.loads(about["image_size"]) == 224


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("model.onnx", "--out must end in .safetensors, .pt, .pth, got model.onnx"),
        ("own.pt", "own.pt exists: choose another --out"),
        ("nowhere/x.pt", "there is no folder nowhere: choose another --out"),
    ],
)
def test_a_bad_place_is_refused(digits, capsys, tmp_path, out, message):
    (tmp_path / "own.pt").touch()
    assert main(["export", str(digits), "--out", out]) == 2
    assert message in capsys.readouterr().err


def test_networks_of_ours_are_exported_as_stock_layers(tmp_path):
    run = tiny.trainer(out=tmp_path / "run", build=None, model="alexnet", epochs=1)
    run.run()
    checkpoint = read_checkpoint(tmp_path / "run")
    assert all(type(m).__module__.startswith("torch.nn") for m in checkpoint.model.features)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(checkpoint.model(images), run.model.eval()(images))
