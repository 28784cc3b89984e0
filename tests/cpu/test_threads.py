"""Kernels that several threads run at once, each with its own tensors or all with the same."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

import wus_ext  # noqa: F401  (registers torch.ops.wus)

ops = torch.ops.wus
THREADS, ROUNDS = 4, 5


def channels_last(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


def relu(x):
    y, mask = ops.activate(x)
    return [y, mask, *ops.activate_grad(y, mask)]


def pool(x):
    y, code = ops.relu_max_pool(x)
    return [y, code, *ops.max_pool_bias_grad(y, code, x.shape[2:])]


def norm(x):
    mean, var = ops.batch_norm_stats(x)
    scale, shift, _ = ops.batch_norm_scale_shift(mean, var, None, None, 1e-5)
    y, mask = ops.batch_norm_apply(x, scale, shift, None, 1)
    return [mean, var, y, *ops.batch_norm_grad_coefficients(y, x, mean, var, mask=mask, act=1)]


def winograd(x):
    channels, size = x.shape[1], x.shape[2:]
    weight = torch.ones(channels, channels, 3, 3) / channels
    results = []
    for scheme in (2, 4):
        forward, backward = (ops.winograd_pack(weight, dgrad, scheme) for dgrad in (False, True))
        y, mask = ops.winograd_forward(x, forward, None, channels, 1, scheme, 1)
        results += [y, mask]
        results += ops.winograd_dgrad(y, backward, mask, channels, size, 1, scheme, 2)
        results.append(ops.winograd_wgrad(y, x, mask, 1, scheme, 2))
    return results


def strided(x):
    channels, size = x.shape[1], x.shape[2:]
    weight = torch.ones(channels, channels, 3, 3) / channels
    numbers = [3, 3], [2, 2], [1, 1]
    y = ops.strided_forward(x, ops.strided_pack(weight, False), None, channels, *numbers)
    grad = ops.strided_dgrad(y, ops.strided_pack(weight, True), channels, size, *numbers)
    return [y, grad]


def linear(x):
    x = x.flatten(1)
    weight = torch.ones(48, x.shape[1]) / x.shape[1]
    y = ops.linear_forward(x, weight)
    return [y, ops.linear_dgrad(y, weight)]


@pytest.mark.parametrize("shared", [True, False], ids=["same_tensors", "own_tensors"])
@pytest.mark.parametrize("kernel", [relu, pool, norm, winograd, strided, linear])
def test_threads_do_not_disturb_each_other(kernel, shared):
    images = [channels_last(3, 40, 20, 18)] * THREADS
    if not shared:
        images = [channels_last(3, 40, 20 - 2 * i, 18) for i in range(THREADS)]
    expected = [kernel(x) for x in images]
    start = Barrier(THREADS)

    def run(x):
        start.wait()
        return [kernel(x) for _ in range(ROUNDS)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(run, images))
    finally:
        sys.setswitchinterval(interval)
    for rounds, right in zip(results, expected, strict=True):
        for result in rounds:
            assert all(map(torch.equal, result, right))
