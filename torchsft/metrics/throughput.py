"""Peak speed of a device, model FLOPs utilisation, and memory."""

from __future__ import annotations

import re
import resource
import sys

import torch

# Dense bf16 tensor-core TFLOP/s with fp32 accumulation, from NVIDIA's data sheets (where those give the figure with
# 2:4 sparsity, half of it). The first row whose words all occur in the device's name counts: variants before families.
# A100, A10, A40, H100, H200, H800, B200, GB200, L40S and L4 were compared with published tables; the others were not.
_PEAK_BF16_TFLOPS = (
    (("gb300",), 2500.0),  # GB300 NVL72
    (("gb200",), 2500.0),  # GB200 NVL72: 5 PFLOP/s sparse per GPU
    (("b300",), 2250.0),  # HGX B300: 36 PFLOP/s sparse for 8
    (("b200",), 2250.0),  # HGX B200: 36 PFLOP/s sparse for 8
    (("gh200",), 989.0),
    (("h200", "nvl"), 835.0),  # 1,671 sparse
    (("h200",), 989.0),  # 1,979 sparse
    (("h100", "nvl"), 835.0),  # 1,671 sparse
    (("h100", "pcie"), 756.0),  # 1,513 sparse
    (("h100",), 989.0),  # SXM: 1,979 sparse
    (("h800", "pcie"), 756.0),
    (("h800",), 989.0),
    (("h20",), 148.0),
    (("a100",), 312.0),
    (("a800",), 312.0),
    (("a30",), 165.0),
    (("a10",), 125.0),
    (("a40",), 149.7),
    (("l40s",), 362.0),
    (("l40",), 181.0),
    (("l4",), 121.0),  # 242 sparse
    (("rtx", "a6000"), 154.8),  # 309.7 sparse
    (("rtx", "3090"), 71.0),
    (("rtx", "4090"), 165.2),
    (("rtx", "5090"), 209.5),
)


def peak_bf16_tflops(device_name: str) -> float | None:
    """Peak dense bf16 TFLOP/s of one NVIDIA device by its name (`torch.cuda.get_device_name`); None if it is not known.

    A MIG slice has a share of the device that its name does not tell, so it is not known either.
    """
    words = set(re.split(r"[\s\-]+", device_name.lower()))
    if "mig" in words:
        return None
    return next((peak for required, peak in _PEAK_BF16_TFLOPS if words.issuperset(required)), None)


def peak_tflops(device: torch.device) -> float | None:
    """Peak dense bf16 TFLOP/s of `device`; None for a CPU and for a device that is not in the table."""
    return peak_bf16_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def mfu(flops: float, seconds: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B): the model's own share of the peak.

    Args:
        flops: what one device's share of a training step needs, forward and backward, recomputation not counted.
        seconds: how long the step took.
        peak_tflops: peak of one device in TFLOP/s.

    Returns:
        A share, 0 to 1.
    """
    return flops / (seconds * peak_tflops * 1e12)


def device_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA device; None for a CPU, which can swap."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this process since its start, in GiB, by TensorBoard tag.

    On CUDA what the caching allocator gave out and what it held; on CPU the resident set of the whole process.
    """
    if device.type == "cuda":
        return {
            "memory/peak_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return {"memory/peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
