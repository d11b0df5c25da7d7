"""torchsft: full-parameter supervised fine-tuning of large Mixture-of-Experts language models on
plain PyTorch.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import `load_model` on first use, so that `import torchsft` stays light."""
    if name == "load_model":
        from torchsft.checkpoint.huggingface import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
