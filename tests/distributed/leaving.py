"""One process of several: trains inside ``launched`` and exits with 1 if its group outlives that.

torchrun --nproc-per-node 2 -m tests.distributed.leaving
"""

from __future__ import annotations

import weakref

import torch.distributed as dist

from wus_ext.training.launch import launched

from .trainer_checks import trainer


def main() -> bool:
    with launched("cpu"):
        group = weakref.ref(dist.group.WORLD)
        run = trainer(method="wus", warmup=1, patience=1, threshold=100, epochs=3)
        run.run()
        skipped = any(record["skipped"] for record in run.history)
        del run
    return skipped and group() is None


if __name__ == "__main__":
    raise SystemExit(not main())
