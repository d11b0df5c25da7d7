"""What is known of a stored tensor without its values: the words of safetensors headers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# The header's words for dtypes.
FP8 = "F8_E4M3"
WEIGHT_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    FP8: torch.float8_e4m3fn,
}
DTYPES = WEIGHT_DTYPES | {"F64": torch.float64, "BOOL": torch.bool}
DTYPES |= {"F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
DTYPES |= {
    f"{kind[0].upper()}{n}": getattr(torch, f"{kind}{n}")
    for kind in ("int", "uint")
    for n in (8, 16, 32, 64)
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Weights in several parts, of few bits each (precision/formats.py): word -> bytes of an element.
PACKED_BYTES = {"INT4": 0.5, "MXFP4": 0.5}


def listing(names: Sequence[str], most: int = 20) -> str:
    """Names, cut with their count where there are many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor.

    Attributes:
        dtype: the header's word for it, such as "BF16".
        stack: key of the tensor in the file that it is a part of; "" where it stands there by
            itself.
        start: index of its first element in that.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    stack: str = ""
    start: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of its values, without scales."""
        size = PACKED_BYTES.get(self.dtype) or DTYPES[self.dtype].itemsize
        return int(math.prod(self.shape) * size)
