"""Elements of SVG and HTML as text, and the policy of a page that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape


def element(tag: str, content: str = "", **attributes: object) -> str:
    """Return an element; in names of attributes an underscore stands for a hyphen."""
    given = []
    for name, value in attributes.items():
        name = name.replace("_", "-")
        if isinstance(value, float):
            value = f"{value:.1f}"
        given.append(f'{name}="{value}"')
    start = " ".join([tag, *given])
    return f"<{start}>{content}</{tag}>"


def rectangle(
    x: float, y: float, width: float, height: float, content: str = "", **attributes: object
) -> str:
    """Return a filled rectangle."""
    place = {"x": float(x), "y": float(y)}
    size = {"width": float(width), "height": float(height)}
    return element("rect", content, **place, **size, **attributes)


def word(x: float, y: float, text: str, **attributes: object) -> str:
    """Return text whose line stands at `y`."""
    return element("text", escape(text), x=float(x), y=float(y), **attributes)


def picture(
    width: float, height: float, background: str, parts: Sequence[str], **attributes: object
) -> str:
    """Return an SVG file, or part of a page; `attributes` are those of all parts."""
    ground = rectangle(0, 0, width, height, fill=background)
    group = element("g", "\n" + "\n".join(parts) + "\n", **attributes)
    svg = element(
        "svg",
        f"\n{ground}\n{group}\n",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=float(width),
        height=float(height),
    )
    return svg + "\n"


def policy(page: str) -> str:
    """Return a content security policy: a page's own style and script run, of each of which it has
    at most one, and nothing else does or is loaded.
    """
    allowed = [
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        for tag in ("style", "script")
        for content in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    ]
    return "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])
