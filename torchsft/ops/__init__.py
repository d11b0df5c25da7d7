"""Operations with a gradient of their own, each beside the plain PyTorch that it replaces.

`--model.ops plain` computes a whole run with the plain twins (here, and the rotation and the loss in models/).
"""

_plain = False


def use_plain(on: bool) -> None:
    """Compute with the plain twins from now on, or not; for this process."""
    global _plain
    _plain = on


def plain() -> bool:
    """Whether the plain twins are to be used."""
    return _plain
