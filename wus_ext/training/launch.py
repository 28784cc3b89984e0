"""Processes that torchrun, or whoever sets its environment variables, started for one training."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

__all__ = ["launched", "launched_count"]


def launched_count() -> int:
    """How many processes the launcher started: 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def launched(device: str = "auto") -> Iterator[None]:
    """Joins the launcher's processes for what is done inside; without a launcher does nothing.

    Args:
        device: what they compute on, as in :class:`TrainConfig`; decides how they communicate.
    """
    if launched_count() == 1:
        yield
        return
    on_gpus = torch.cuda.is_available() and device != "cpu"
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    # DistributedDataParallel imports it. Imported while there is a group, it keeps that alive for
    # good.
    importlib.import_module("torch._dynamo")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
        # With the last reference to the group its threads end. One that still holds a tensor when
        # the interpreter shuts down aborts the process.
        gc.collect()
