"""Data sets of the library `datasets`: of a directory, or on the hub."""

import http.client
import os
import ssl
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from torchsft.config import InputError
from torchsft.data.specs import HUB, Spec, is_saved

OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_offline() -> bool:
    """Return whether the user lets the libraries of the hub use their local cache only."""
    values = (os.environ.get(name, "") for name in OFFLINE_SWITCHES)
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def unreachable() -> str:
    """Return why the hub cannot be reached, found out within seconds.

    Returns:
        "" where it can be reached; where that cannot be found out (a proxy that urllib does not
        know, a certificate that it does not have), or is not wanted.
    """
    if is_offline() or "all" in urllib.request.getproxies():
        return ""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(address, method="HEAD")
        # `urlopen` keeps the proxies of its first call
        urllib.request.build_opener().open(request, timeout=5).close()
    except urllib.error.HTTPError:
        return ""  # it answers
    except (ValueError, http.client.HTTPException):
        return ""  # no address, or an odd server: the libraries say more
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return ""
        host = urlsplit(address).hostname
        return f"{host}: {getattr(reason, 'strerror', None) or reason}"
    return ""


def open_dataset(spec: Spec, streaming: bool) -> Any:
    """Return the `datasets.Dataset`, or streamed `IterableDataset`, of a directory, or of NAME or
    NAME/CONFIG on the hub.

    Raises:
        InputError: it does not exist or cannot be opened, or the split is missing or unknown.
    """
    is_directory = os.path.isdir(spec.path)
    is_on_hub = not is_directory and HUB.fullmatch(spec.path) is not None
    can_be_loaded = spec.split and (is_directory or is_on_hub)
    if not is_saved(spec.path) and not can_be_loaded:
        problem = "does not exist"
        if is_directory:
            problem = "is a directory, but none of datasets' save_to_disk; name the files in it"
        raise InputError(
            f"{spec.given} {problem}; give an existing file or directory, or NAME:SPLIT for a "
            f"dataset of the hub"
        )
    # the libraries would try for half a minute and more
    reason = unreachable() if is_on_hub else ""
    if reason:
        raise InputError(
            f"{spec.given} cannot be opened, as the hub of data sets cannot be reached ({reason}); "
            f"check the network, download it beforehand and name its files, or set "
            f"HF_HUB_OFFLINE=1 to use the local cache"
        )
    try:
        loaded = _load(spec, streaming)
    except Exception as error:  # of the network, of the hub, of any file format
        raise InputError(_problem(spec, is_on_hub, error)) from None
    if is_saved(spec.path):
        return _split_of(loaded, spec)
    return loaded


def _load(spec: Spec, streaming: bool) -> Any:
    import datasets  # slow, and mostly not needed

    if is_saved(spec.path):
        return datasets.load_from_disk(spec.path)
    if os.path.isdir(spec.path):
        name, config = spec.path, None
    else:
        name, config = HUB.fullmatch(spec.path).groups()
    return datasets.load_dataset(name, config, split=spec.split, streaming=streaming)


def _problem(spec: Spec, is_on_hub: bool, error: Exception) -> str:
    """Return a sentence on a data set that could not be loaded."""
    is_network = is_on_hub and isinstance(error, OSError)
    if is_network and is_offline():
        return (
            f"{spec.given} is not in the local cache, and offline mode (HF_HUB_OFFLINE) forbids "
            f"the network; download it beforehand without that, or name a local copy of its files"
        )
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    network = "the network, " if is_network else ""
    return (
        f"{spec.given} cannot be opened as a dataset ({reason}); check {network}its "
        f"name, split and files"
    )


def _split_of(saved: Any, spec: Spec) -> Any:
    """Return the data set of the split, of what save_to_disk wrote."""
    if not isinstance(saved, dict):
        if spec.split:
            raise InputError(f"{spec.given} cannot be used, as the dataset has no splits")
        return saved
    if spec.split in saved:
        return saved[spec.split]
    splits = list(saved)
    raise InputError(
        f"{spec.given} cannot be used, as the dataset has the splits {', '.join(splits)}; give one "
        f"as {spec.path}:{splits[0]}"
    )
