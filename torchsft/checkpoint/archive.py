"""What `torch.save` makes of one tensor, which is how DCP stores a chunk: a zip archive with a
description and the values, uncompressed.
"""

import io
import mmap
import pickle
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.serialization import config as serialization

from torchsft.checkpoint.storage import Output

# All that an archive says of its values stands in its first and last bytes.
HEAD_BYTES, TAIL_BYTES = 1024, 2048
_without_crc = threading.Lock()


def bytes_of(values: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    flat = values.as_strided((values.numel(),), (1,))  # one element may have any stride
    return memoryview(flat.view(torch.uint8).numpy())


def write_archive(values: Tensor, output: Output) -> None:
    """Append the archive of a tensor of any device, dtype and strides.

    Raises:
        OSError: the file cannot be written.
    """
    values = values.detach().cpu().contiguous()
    # torch.save writes a tensor's whole storage: here one of these values alone, in the same
    # memory.
    alone = values.new_empty(0)
    if values.numel():
        alone = torch.frombuffer(bytes_of(values), dtype=values.dtype)
    # The checksums inside the archive are left out: they take longer than the file's own, and
    # nothing reads them. The option is global: one thread at a time.
    with _without_crc, serialization.patch("save.compute_crc32", False):
        try:
            torch.save(alone.view(values.shape), output)
        except RuntimeError as error:  # torch's archive writer hides what the file said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_archive(data: bytes | bytearray, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor that an archive holds.

    Raises:
        ValueError: it is no tensor, or of another shape or dtype.
        Exception: whatever torch makes of damaged bytes.
    """
    try:
        values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch advises to trust it
        raise ValueError("it holds something else than values") from None
    if not isinstance(values, Tensor) or tuple(values.shape) != tuple(shape):
        raise ValueError("not a tensor of the stated shape")
    if values.dtype != dtype:
        raise ValueError(f"dtype {values.dtype} instead of {dtype}")
    return values.detach()


def values_offset(
    head: bytes | bytearray,
    tail: bytes | bytearray,
    length: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> int | None:
    """Find where in an archive its values stand, in order.

    Args:
        head, tail: the archive's first HEAD_BYTES and last TAIL_BYTES.
        length: bytes of the archive.
        shape, dtype: of the tensor that it should hold.

    Returns:
        Bytes from the archive's start; None where the values do not stand in order (strides, a view
        of a larger storage, another byte order), or where these bytes do not say so.
    """
    other_order = b"big" if sys.byteorder == "little" else b"little"
    if other_order in head + tail:  # torch would swap bytes that are not there
        return None
    memory = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        # An archive with nothing but a hole between head and tail. On the meta device torch reads
        # the description alone.
        with mmap.mmap(-1, length, flags=memory) as archive:
            archive[:HEAD_BYTES] = head
            archive[-TAIL_BYTES:] = tail
            values = torch.load(archive, map_location="meta", weights_only=True)
        in_order = values.is_contiguous() and values.storage_offset() == 0
        changed = values.is_conj() or values.is_neg()
        expected = values.shape == torch.Size(shape) and values.dtype == dtype
        if not (in_order and expected) or changed:
            return None
        return values.untyped_storage()._checkpoint_offset
    except Exception:  # torch knows what this is when it has all of it
        return None
