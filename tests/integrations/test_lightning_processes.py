"""The Lightning callback in two processes: skip steps average what they train."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from wus_ext.training.launch import launched

pl = pytest.importorskip("lightning.pytorch")

ROOT = Path(__file__).parents[2]


class Direct(pl.LightningModule):
    """Calls its layers in training_step, not itself nor a network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def training_step(self, batch, index):
        output = self.second(self.first(batch[0]).relu())
        return nn.functional.cross_entropy(output, batch[1])

    def validation_step(self, batch, index):
        self.log("acc", 0.5, sync_dist=True)

    def on_train_epoch_start(self):
        self.before = self.first.weight.detach().clone()

    def on_train_epoch_end(self):
        own = torch.cat([p.detach().flatten() for p in self.parameters()])
        same = all(torch.equal(own, other) for other in self.all_gather(own))
        stood_still = torch.equal(self.before, self.first.weight)
        if self.global_rank == 0:
            print(f"epoch {self.current_epoch}: same {same}, stood still {stood_still}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


def train() -> None:
    from wus_ext.integrations.lightning import WeightUpdateSkipping

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 4, generator=generator)
    data = torch.utils.data.TensorDataset(images, (images.sum(1) > 0).long())
    batches = torch.utils.data.DataLoader(data, batch_size=4)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[WeightUpdateSkipping("acc", patience=1, warmup=0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Direct(), batches, batches)


def main() -> bool:
    # Lightning leaves its process group to the end of the interpreter, which may abort there.
    with launched("cpu"):
        group = weakref.ref(dist.group.WORLD)
        train()
    return group() is None


def test_layers_called_by_training_step_itself():
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
         *("-m", "tests.integrations.test_lightning_processes")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert said == [f"epoch {epoch}: same True, stood still {epoch >= 2}" for epoch in range(4)], (
        done.stdout
    )


if __name__ == "__main__":
    raise SystemExit(not main())
