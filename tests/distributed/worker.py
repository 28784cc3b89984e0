"""Runs every check of ``*_checks.py`` in one process of several; torchrun starts it.

    torchrun --nproc-per-node 2 -m tests.distributed.worker FOLDER [NAME ...]

Each process writes FOLDER/RANK.json: check -> traceback, empty where it passed. Each check has a
process group of its own, so that a failed one harms no other.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from . import (
    backward_checks,
    fsdp_checks,
    join_checks,
    policy_checks,
    switch_checks,
    traffic_checks,
    trainer_checks,
    wrapper_checks,
)

MODULES = (
    wrapper_checks,
    switch_checks,
    backward_checks,
    join_checks,
    policy_checks,
    traffic_checks,
    fsdp_checks,
    trainer_checks,
)
CHECKS = {
    name: check
    for module in MODULES
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = os.environ.get("BACKEND", "gloo")
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    store, _, _ = next(dist.rendezvous("env://"))
    outcome = {}
    for name in names or CHECKS:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=20),
        )
        torch.manual_seed(0)
        try:
            CHECKS[name]()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(outcome))
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
