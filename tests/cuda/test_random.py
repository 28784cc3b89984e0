"""Networks at random as they run on a GPU, against stock PyTorch: see tests/engine/test_random.py.

WUS_EXAMPLES=3000 python -m pytest tests/cuda/test_random.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from ..engine.networks import Block, Network, Pool, networks
from ..engine.test_random import Setting, a_setting, check_steps, examples
from .conftest import Gpu


def without_dropout(network: Network) -> Network:
    """Stock's own on a GPU draws its masks in no order that can be repeated here."""
    return Network(
        network.input,
        tuple(replace(block, dropout=0.0) for block in network.blocks),
        tuple(replace(layer, dropout=0.0) for layer in network.layers),
    )


def of_kernels(network: Network) -> Network:
    """With no activation but ReLU, so no gate, and no pool but 2x2: others join no chain on a GPU,
    whereas the emulated one's tensors are the CPU's."""

    def relu(part):
        return replace(part, activation=part.activation and "ReLU")

    def plain(block: Block) -> Block:
        pool = block.activation and block.pool and Pool("max", 2, 2, 0, False)
        return replace(relu(block), pool=pool, gate=None)

    return Network(
        network.input, tuple(map(plain, network.blocks)), tuple(map(relu, network.layers))
    )


@examples(100)
@given(networks(), a_setting)
@pytest.mark.filterwarnings("ignore:convert. Sequential has no bias")
def test_steps(chains: Gpu, network: Network, setting: Setting):
    network = without_dropout(network)
    if chains.device == "cpu":  # whose own convolutions in bfloat16 are no reference
        network = of_kernels(network)
        setting = replace(setting, dtype="float32")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        check_steps(network, setting, chains.device)
