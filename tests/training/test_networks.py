"""Networks by name: ours, torchvision's, timm's, and one's own."""

import pytest
import torch
from torch import nn

from wus_ext.cli import main
from wus_ext.training import ConfigError, DataError, TrainConfig, Trainer, networks
from wus_ext.training.networks import build_network, check_forward, check_name

from . import tiny

OWN = """
import helper
from torch import nn

def build(classes):
    return nn.Sequential(nn.Conv2d(3, helper.WIDTH, 3, stride=4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(helper.WIDTH * 64, classes))

def number(classes):
    return classes

def broken(classes):
    return nn.Linear(missing, classes)
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    return tmp_path / "own.py"


def test_a_function_in_a_file(own):
    network = build_network(f"{own}:build", 7)
    assert network[-1].out_features == 7
    assert network[0].out_channels == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:build", "there is no file nowhere.py"),
        ("{own}:other", "has no function 'other'"),
        ("{own}:number", "number.3. must return a torch.nn.Module, got int"),
        ("{own}:broken", r"broken.3. failed: NameError: name 'missing' is not .*own.py, line 13\)"),
        ("{bad}:build", r"failed: SyntaxError: .*bad.py, line 2\)"),
        ("torchvision:resnet19", "torchvision has no network 'resnet19', but .*resnet1"),
        ("timm:nothing_like_it", "timm has no network 'nothing_like_it'"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(own, name, message):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    bad = own.with_name("bad.py")
    bad.write_text("import torch\ndef build(:\n")
    with pytest.raises(ConfigError, match=message) as caught:
        build_network(name.format(own=own, bad=bad), 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lenet", "torchvision:", "keras:x", "file.py", "file.py:", ":f"])
def test_the_form_of_a_name(name):
    with pytest.raises(ConfigError, match=r"model must be one of alexnet, .*torchvision:NAME"):
        check_name(name)


@pytest.mark.parametrize("name", ["googlenet", "squeezenet1_1", "vgg11"])
def test_torchvisions_networks(name):
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        network = build_network(f"torchvision:{name}", 7)
    last = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    assert last.weight.shape[0] == 7


def test_the_command_trains_ones_own_network_and_resumes(own, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "train --limit-train 20 --limit-test 10 --batch-size 10 --method wus --warmup 0"
    assert main([*arguments.split(), "--model", "own.py:build", "--epochs", "1"]) == 0
    out = "runs/own.py-build-digits-wus-seed0"
    assert f"all in {out}" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", out]) == 0
    own.unlink()
    assert main(["train", "--resume", "--out", out]) == 2


def test_torchvisions_and_timms_networks_train():
    pytest.importorskip("timm")
    for name in ("torchvision:mobilenet_v3_small", "timm:test_resnet"):
        config = tiny.CONFIG.replace(model=name, epochs=3, method="wus")
        run = Trainer(config, data=tiny.data())
        assert [record["skipped"] for record in run.run()] == [False, False, True]


# What a network must take and give


def test_a_network_for_other_images_is_refused_before_anything_is_written(tmp_path):
    pytest.importorskip("torchvision")
    config = tiny.CONFIG.replace(model="torchvision:alexnet")
    with pytest.raises(ConfigError, match=r"fails on 3x32x32 images .*: use another --image-size"):
        Trainer(config, data=tiny.data(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_outputs_must_be_scores():
    images = torch.zeros(2, 3, 8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).train()
    check_forward(model, images, 5, "mine")
    with pytest.raises(ConfigError, match=r"'mine' must give .* \(2, 4\), .*, got \(2, 5\)"):
        check_forward(model, images, 4, "mine")

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ConfigError, match="got tuple"):
        check_forward(Pair(), images, 4, "mine")
    assert model.training


def test_a_check_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_forward(model, torch.rand(2, 3, 8, 8), 2, "mine")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Pretrained weights


@pytest.fixture
def hub(monkeypatch):
    """torchvision's weights of a ResNet-18, without a network."""
    models = pytest.importorskip("torchvision.models")
    there = models.resnet18()
    monkeypatch.setattr(
        models.ResNet18_Weights.DEFAULT.__class__,
        "get_state_dict",
        lambda self, **options: there.state_dict(),
    )
    return there


def test_pretrained_weights_and_their_normalisation(hub, capsys):
    config = TrainConfig(
        model="torchvision:resnet18", weights="pretrained", limit_train=20, limit_test=10,
        batch_size=10, device="cpu", method="baseline",
    )  # fmt: skip
    said = []

    class Said:
        say = said.append

    run = Trainer(config, progress=Said)
    assert torch.equal(run.model.layer4[1].conv2.weight, hub.layer4[1].conv2.weight)
    assert run.model.fc.out_features == 10
    assert said == [
        "weights: 120 of 122 tensors from pretrained torchvision:resnet18; "
        "new, for other classes: fc.weight, fc.bias"
    ]
    assert "normalised with pretrained mean" in run.data.about
    scale = run.data.normalize.scale.flatten()
    torch.testing.assert_close(scale, 1 / (255 * torch.tensor([0.229, 0.224, 0.225])))


def test_without_a_network_one_line_says_so(monkeypatch):
    models = pytest.importorskip("torchvision.models")

    def fetch(self, **options):
        raise OSError("no route")

    monkeypatch.setattr(models.ResNet18_Weights.DEFAULT.__class__, "get_state_dict", fetch)
    with pytest.raises(DataError, match=r"cannot fetch .*\(no route\): use --weights FILE"):
        networks.pretrained_weights("torchvision:resnet18")


@pytest.mark.parametrize("name", ["vgg11", "own.py:build"])
def test_others_have_no_pretrained_weights(name):
    for ask in (networks.pretrained_weights, networks.pretrained_statistics):
        with pytest.raises(ConfigError, match="has no pretrained weights: use --weights FILE"):
            ask(name)


def test_timms_statistics():
    pytest.importorskip("timm")
    mean, std = networks.pretrained_statistics("timm:vit_tiny_patch16_224")
    assert (mean.tolist(), std.tolist()) == ([0.5] * 3, [0.5] * 3)
