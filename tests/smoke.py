"""A package in an environment of its own is the one that runs there, and its steps are right."""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

import wus_ext


def main() -> None:
    assert Path(sys.argv[1]) in Path(wus_ext.__file__).parents, wus_ext.__file__
    assert (Path(wus_ext.__file__).parent / "py.typed").exists()

    stock = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    ).to(memory_format=torch.channels_last)
    model = wus_ext.convert(copy.deepcopy(stock), full="fused")
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
    for skip in (False, True):
        wus_ext.set_skip(model, skip)
        for net in (stock, model):
            net.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
        for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
            if skip and name.endswith("weight"):
                assert mine.grad is None, name
            else:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    print("wus_ext", wus_ext.build_info())


if __name__ == "__main__":
    main()
