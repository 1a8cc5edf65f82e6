"""What the pretended device catches: each fault, and nothing that CUDA allows."""

import pytest
import torch

from tests.support.pretend_device import LEDGER, DeviceFault, installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not installed(), reason="needs the pretended device"),
]


def test_mixed_devices_raise_with_file_and_line() -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: torch.where(here > 0, there, there),
        lambda: here.add_(there),
        lambda: here[torch.zeros(1, dtype=torch.long, device="cuda")],
    ):
        with pytest.raises(DeviceFault, match=r"at tests/gpu/test_pretend_device\.py:\d+"):
            mixed()
    with pytest.raises(DeviceFault, match="numpy"):
        there.numpy()
    assert (there + torch.tensor(2.0)).device.type == "cuda", "CUDA takes numbers from the host"


def test_a_generator_of_the_other_device_raises() -> None:
    here, there = torch.Generator(), torch.Generator("cuda")
    assert torch.rand(2, generator=there, device="cuda").is_cuda
    with pytest.raises(DeviceFault, match="generator on cpu"):
        torch.rand(2, generator=here, device="cuda")
    with pytest.raises(DeviceFault, match="generator on cuda"):
        torch.rand(2, generator=there)


def test_a_copy_has_not_arrived_before_somebody_waits() -> None:
    there, host = torch.arange(4.0, device="cuda"), torch.empty(4, pin_memory=True)
    host.copy_(there, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    assert not copied.query()
    assert not torch.equal(host, torch.arange(4.0))
    copied.synchronize()
    assert copied.query()
    assert torch.equal(host, torch.arange(4.0))


def test_every_wait_is_counted_at_its_line() -> None:
    there = torch.arange(4.0, device="cuda")
    with LEDGER.counting() as waits:
        there.sum().item()
        bool(there.any())
        there[there > 1]
        there.nonzero()
        there.tolist()
        there.cpu()
        torch.ones(2).to("cuda")
        there[torch.tensor([0, 1])]
    assert sum(waits.values()) == 8
    assert len(waits) == 8
    with LEDGER.counting() as waits:
        (there * 2).sum().clamp(min=torch.zeros((), device="cuda"))
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        there[torch.zeros(1, dtype=torch.long, device="cuda")]
        torch.where(there > 0, there, 0.0)
    assert not waits


def test_autocast_and_backward_run_on_the_device() -> None:
    weight = torch.ones(3, 3, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        made = torch.nn.functional.linear(torch.ones(2, 3, device="cuda"), weight)
    assert made.dtype == torch.bfloat16
    made.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.device == torch.device("cuda:0")


def test_a_result_that_does_not_fit_is_out_of_memory() -> None:
    with LEDGER.room(1 << 10), pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1 << 10, device="cuda")
