"""Peak speed of a device, model FLOPs utilisation, and memory."""

import re
import resource
import sys

import torch

# Dense bf16 tensor-core TFLOP/s with fp32 accumulation, from NVIDIA's data sheets (where those give
# the figure with 2:4 sparsity, half of it). The first model whose words all occur in the device's
# name counts: variants before families. A100, A10, A40, H100, H200, H800, B200, GB200, L40S and L4
# were compared with published tables; the others were not.
_PEAK_BF16_TFLOPS = (
    (2500.0, "gb300", "gb200"),  # GB300 NVL72; GB200 NVL72: 5 PFLOP/s sparse per GPU
    (2250.0, "b300", "b200"),  # HGX B300 and HGX B200: 36 PFLOP/s sparse for 8
    (835.0, "h200 nvl", "h100 nvl"),  # 1,671 sparse
    (756.0, "h100 pcie", "h800 pcie"),  # H100: 1,513 sparse
    (989.0, "gh200", "h200", "h100", "h800"),  # H200 and H100 SXM: 1,979 sparse
    (148.0, "h20"),
    (312.0, "a100", "a800"),
    (165.0, "a30"),
    (125.0, "a10"),
    (149.7, "a40"),
    (362.0, "l40s"),
    (181.0, "l40"),
    (121.0, "l4"),  # 242 sparse
    (154.8, "rtx a6000"),  # 309.7 sparse
    (71.0, "rtx 3090"),
    (165.2, "rtx 4090"),
    (209.5, "rtx 5090"),
)


def peak_bf16_tflops(device_name: str) -> float | None:
    """Return peak dense bf16 TFLOP/s of one NVIDIA device by its name
    (`torch.cuda.get_device_name`); None if it is not known.

    A MIG slice has a share of the device that its name does not tell, so it is not known either.
    """
    words = set(re.split(r"[\s\-]+", device_name.lower()))
    if "mig" in words:
        return None
    rows = ((peak, model.split()) for peak, *models in _PEAK_BF16_TFLOPS for model in models)
    return next((peak for peak, required in rows if words.issuperset(required)), None)


def peak_tflops(device: torch.device) -> float | None:
    """Return peak dense bf16 TFLOP/s of `device`; None for a CPU and for a device that is not in
    the table.
    """
    return peak_bf16_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def mfu(flops: float, seconds: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B): the model's own share of
    the peak, 0 to 1.

    `flops` are what one device's share of a training step of so many `seconds` needs, forward and
    backward, recomputation not counted; `peak_tflops` is the peak of one device in TFLOP/s.
    """
    return flops / (seconds * peak_tflops * 1e12)


def memory_gib(device: torch.device) -> dict[str, float]:
    """Return peak memory of this process since its start, in GiB, by TensorBoard tag.

    On CUDA what the caching allocator gave out and what it held; on CPU the resident set of the
    whole process.
    """
    if device.type == "cuda":
        return {
            "memory/peak_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # of that number: KiB on Linux
    return {"memory/peak_resident_gib": peak * unit / 2**30}
