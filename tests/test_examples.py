"""The examples run from end to end, with little of everything."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
#: For each script the settings that make it short, and what it needs.
SMALL = {
    "transfer_learning": ("--epochs 1 --images 64", "sklearn"),
    "memory_budget": ("--images 16 --budget 8", "torchvision"),
    "style_transfer": ("--steps 2 --size 48 --out {out}/x.png", "torchvision"),
    "perceptual_loss": ("--steps 2 --out {out}/x.png", "torchvision"),
    "adversarial_training": ("--steps 2", "sklearn"),
    "bitfit": ("--steps 2", "transformers"),
    "lightning_callback": ("--epochs 2 --images 64", "lightning"),
    "unet": ("--steps 2", "sklearn"),
    "gan": ("--steps 2 --out {out}/x.png", "torchvision"),
    "own_policy": ("--epochs 2 --images 64", "sklearn"),
    "command_line": ("--epochs 2 --out {out}", "safetensors"),
}
STOCK = [name for name in SMALL if "stock=False" in (EXAMPLES / f"{name}.py").read_text()]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example; returns what it printed."""
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_it(name, *more):
        arguments, needed = SMALL[name]
        pytest.importorskip(needed)
        sys.modules.pop(name, None)
        importlib.import_module(name).main([*arguments.format(out=tmp_path).split(), *more])
        return capsys.readouterr().out

    yield run_it
    for name in (*SMALL, "network", "options", "real_images"):
        sys.modules.pop(name, None)


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *SMALL,
        "network",
        "options",
        "real_images",
    }


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs(run, name):
    assert run(name)


@pytest.mark.parametrize("name", STOCK)
def test_stock_gives_the_same(run, name):
    """Of the numbers in the last line of each way, those that are no times."""
    figures = [figures_of(run(name, *more)) for more in ((), ("--stock",))]
    assert figures[0]
    assert figures[0] == pytest.approx(figures[1], rel=0.1)


def figures_of(text):
    line = next(line for line in text.splitlines() if "->" in line or line.startswith("step"))
    words = line.replace(",", " ").partition(" in ")[0].split()
    values = [float(word) for word in words if word.replace(".", "", 1).isdigit()]
    return values[:-1] if line.startswith("step") else values


@pytest.mark.parametrize("name", SMALL)
def test_an_example_fits_a_screen_or_two(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 90
