"""The GPU that is the host (``make gpu-test``) is as strict as one in earnest."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def on_host() -> None:
    if "gpu_on_host.install" not in sys.modules:
        pytest.skip("this is a GPU in earnest")


def twos() -> Tensor:
    return torch.ones(3, device="cuda") * 2


@pytest.mark.gpu
def test_who_does_not_wait_for_another_stream_finds_nothing() -> None:
    side, x = torch.cuda.Stream(), twos()
    with torch.cuda.stream(side):
        early = x * 2
        side.synchronize()
    assert not torch.equal(early.cpu(), torch.full((3,), 4.0))
    x = twos()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = x * 2
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(late.cpu(), torch.full((3,), 4.0))


@pytest.mark.gpu
def test_a_capture_computes_nothing_and_its_replays_all() -> None:
    x, graph = twos(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    values = [x.tolist()]
    for _ in range(2):
        graph.replay()
        values.append(x.tolist())
    assert values == [[2.0] * 3, [3.0] * 3, [4.0] * 3]


@pytest.mark.gpu
def test_a_capture_must_not_wait() -> None:
    x = twos()
    with (
        pytest.raises(RuntimeError, match="captur"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        x.sum().item()


@pytest.mark.gpu
def test_devices_must_not_be_mixed() -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        twos() + torch.ones(3)
    with pytest.raises(RuntimeError, match="on the same device"):
        twos() + torch.ones(3, device="cuda:1")


@pytest.mark.gpu
def test_kernels_take_tensors_of_the_current_device() -> None:
    import triton
    from triton import language as tl

    from fastmaml.backends.triton.launching import launch

    @triton.jit
    def double(x, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(x + i, 2 * tl.load(x + i))

    x = torch.ones(4, device="cuda:1")
    with pytest.raises(ValueError, match="x is on cuda:1"):
        launch(double, (1,))(x, 4)
    with torch.cuda.device(1):
        launch(double, (1,))(x, 4)
    assert x.tolist() == [2.0] * 4
