"""What the launchers owe CUDA: no synchronisation, the current stream and device, graphs, and more
than 2^31 elements."""

import pytest
import torch

import wus_ext  # noqa: F401  (registers torch.ops.wus)

from ..cpu.rows import dense, same

ops = torch.ops.wus

pytestmark = pytest.mark.usefixtures("real_gpu")


def every_kernel(g, x):
    y, mask = ops.activate(x)
    grad_input, grad_bias = ops.activate_grad(g, mask)
    added, added_mask = ops.activate(y, g)
    pooled, code = ops.relu_max_pool(added)
    unpooled, pool_bias = ops.max_pool_bias_grad(pooled, code, added.shape[2:])
    return [grad_input, grad_bias, ops.apply_mask(unpooled, added_mask), pool_bias]


def tensors():
    return [dense(torch.randn(16, 64, 14, 14, device="cuda")) for _ in range(2)]


def assert_equal(results, expected):
    for result, value in zip(results, expected, strict=True):
        same(result, value)


def test_nothing_synchronises():
    g, x = tensors()
    expected = every_kernel(g, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = every_kernel(g, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(results, expected)


def test_current_stream_is_used():
    g, x = tensors()
    expected = every_kernel(g * 3, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(g)
        torch.cuda._sleep(10_000_000)  # a kernel on another stream would still read zeros
        late.copy_(g * 3)
        results = every_kernel(late, x)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(results, expected)


def test_captured_in_a_graph():
    g, x = tensors()
    new_g, new_x = tensors()
    expected = every_kernel(new_g, new_x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = every_kernel(g, x)
    g.copy_(new_g)
    x.copy_(new_x)
    graph.replay()
    assert_equal(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    g, x = tensors()
    results = every_kernel(g.to("cuda:1"), x.to("cuda:1"))
    assert all(result.device.index == 1 for result in results)
    assert_equal([result.to("cuda:0") for result in results], every_kernel(g, x))


def test_a_mask_elsewhere_is_refused():
    g, x = tensors()
    _, mask = ops.activate(x)
    with pytest.raises(ValueError, match=r"mask must be .* on cuda:0, got .* on cpu"):
        ops.activate_grad(g, mask.cpu())


def test_more_than_2_to_the_31_elements():
    rows, channels = 2**23 + 3, 264
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    g = torch.zeros(rows, channels, dtype=torch.bfloat16, device="cuda")
    x = torch.full_like(g, -1)
    for tensor in (g, x):
        tensor[-3:] = torch.randn(3, channels, device="cuda")
    y, mask = ops.activate_(x)
    grad_input, grad_bias = ops.activate_grad(g, mask)
    expected = torch.where(y[-3:] > 0, g[-3:], 0)
    same(grad_input[-3:], expected)
    assert not grad_input[:-3].any()
    torch.testing.assert_close(grad_bias.float(), expected.float().sum(0), rtol=8e-3, atol=1e-6)
