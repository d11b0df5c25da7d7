"""Peak table, MFU and memory."""

import pytest
import torch

from torchsft.metrics.throughput import memory_gib, mfu, peak_bf16_tflops, peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_names_as_the_driver_gives_them(name, peak):
    assert peak_bf16_tflops(name) == peak


def test_a_cpu_has_no_known_peak():
    assert peak_tflops(torch.device("cpu")) is None


def test_mfu_is_one_at_the_peak():
    assert mfu(312e12 * 2.5, 2.5, 312.0) == pytest.approx(1.0)
    assert mfu(312e12, 2.0, 312.0) == pytest.approx(0.5)


def test_memory_of_this_process_is_seen_in_gib():
    def peak():
        return memory_gib(torch.device("cpu"))["memory/peak_resident_gib"]

    with open("/proc/self/status") as status:
        resident_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak() == pytest.approx(resident_kib / 2**20, rel=0.02)


@pytest.mark.gpu
def test_memory_of_a_gpu_counts_allocations():
    device = torch.device("cuda")
    before = memory_gib(device)["memory/peak_allocated_gib"]
    held = [torch.empty(2**28, dtype=torch.float32, device=device) for _ in range(2)]
    after = memory_gib(device)
    assert len(held) == 2 and after["memory/peak_allocated_gib"] >= max(before, 2.0)
    assert after["memory/peak_reserved_gib"] >= after["memory/peak_allocated_gib"]
