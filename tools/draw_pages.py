"""Draw the pictures of the pages, from the code itself.

python tools/draw_pages.py              write them where the pages show them
python tools/draw_pages.py DIRECTORY    write them there, under the same names
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.debug_task import write_debug_data, write_debug_model
from tools.inspection.terminal import STYLES
from torchsft.config import Parallel
from torchsft.parallel.world import mesh_sizes

ROOT = Path(__file__).resolve().parents[1]
# A layout in which every axis is there: 16 ranks.
LAYOUT = Parallel(pp=2, dp_shard=2, cp=2, tp=2, ep=4)
RANKS = 16
# View of the ranks -> its axes that are drawn, and what ranks with other numbers have of their own.
VIEWS = {
    "dense": {
        "pp": "layers",
        "dp_shard": "rows",
        "cp": "tokens of a row",
        "tp": "matrices, tokens",
    },
    "parameter": {"fsdp": "shards of a parameter"},
    "expert": {"edp": "shards of an expert", "ep": "experts"},
}
COLOURS = ("#4477aa", "#ee9944", "#66aa77", "#aa5577")
CELL, STRIP, LEFT, GAP = 42, 24, 244, 12  # pixels: of a rank, of an axis, before ranks, of views

SHOWN = "chats.jsonl:2"  # the conversation that the inspector's picture shows
CHARACTER, LINE, MARGIN = 7.8, 19, 14  # pixels
# What the inspector's colours are called in SVG: of letters, and behind them.
LETTERS = {"31": "#ff7b72", "33": "#e3b341", "34": "#79c0ff", "36": "#56d4dd", "157": "#afffaf"}
BEHIND = {"22": "#005f00"}


def picture(width: float, height: float, parts: Sequence[str], background: str) -> str:
    """Return an SVG file."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    ground = f'<rect width="100%" height="100%" fill="{background}"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def word(x: float, y: float, text: str, **attributes: object) -> str:
    """Return a text element; underscores in names of attributes are hyphens."""
    given = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{given}>{escape(text)}</text>'


def draw_layouts() -> str:
    """Draw how the axes divide the ranks of `LAYOUT`, one strip for each axis."""
    sizes_of = mesh_sizes(LAYOUT, RANKS)
    parts = ['<g font-family="sans-serif" font-size="13" fill="#222222">']
    y = 20.0
    parts.append(word(10, y, "rank", font_weight="bold"))
    for rank in range(RANKS):
        parts.append(word(LEFT + (rank + 0.5) * CELL, y, str(rank), text_anchor="middle"))
    for view, axes in VIEWS.items():
        y += GAP
        sizes = sizes_of[view]
        coordinates = np.unravel_index(range(RANKS), tuple(sizes.values()))
        places = dict(zip(sizes, coordinates, strict=True))
        for axis, meaning in axes.items():
            parts.append(word(10, y + 17, axis, font_weight="bold"))
            parts.append(word(90, y + 17, meaning, fill="#666666"))
            parts += strip(places[axis].tolist(), y)
            y += STRIP
    parts.append("</g>")
    return picture(LEFT + RANKS * CELL + 10, y + 10, parts, "#ffffff")


def strip(numbers: Sequence[int], y: float) -> Iterator[str]:
    """Draw the numbers of all ranks on an axis; neighbours with the same one are one box."""
    for number, group in itertools.groupby(range(len(numbers)), key=lambda rank: numbers[rank]):
        ranks = list(group)
        x, width = LEFT + ranks[0] * CELL, len(ranks) * CELL
        colour = COLOURS[number % len(COLOURS)]
        yield (
            f'<rect x="{x + 1}" y="{y + 1:.0f}" width="{width - 2}" height="{STRIP - 2}" rx="4" '
            f'fill="{colour}"/>'
        )
        yield word(x + width / 2, y + 17, str(number), fill="#ffffff", text_anchor="middle")


def inspector_output() -> str:
    """Return what the inspector prints, in colour, of 41 conversations: in one an answer is not
    trained, one has a key that means nothing, and the last one is there twice.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_debug_model(directory / "model")
        path, _ = write_debug_data(directory, train=40, held_out=1)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows[1]["messages"][4]["weight"] = 0
        rows[3]["source"] = "forum"
        rows.append(rows[6])
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / "chats.jsonl").write_text(lines, encoding="utf-8")
        tool = [sys.executable, str(ROOT / "tools" / "inspect_data.py"), "--color", "always"]
        options = ["--model.path", "model", "--data.train", "chats.jsonl", "--show", SHOWN]
        options += ["--data.seq-len", "512"]
        environment = os.environ | {"TORCHSFT_CACHE": str(directory / "cache"), "PYTHONUTF8": "1"}
        ended = subprocess.run(
            [*tool, *options],
            cwd=directory,
            env=environment,
            check=True,
            capture_output=True,
            encoding="utf-8",
        )
    return ended.stdout


def draw_inspector() -> str:
    """Draw what the inspector prints on a terminal."""
    lines = inspector_output().rstrip("\n").split("\n")
    font = "ui-monospace, Menlo, Consolas, monospace"
    parts = [f'<g font-family="{font}" font-size="13" fill="#d0d7de" xml:space="preserve">']
    longest = 0
    for number, line in enumerate(lines):
        column = 0
        for style, text in runs(line):
            parts += run(style, text, column, number)
            column += len(text)
        longest = max(longest, column)
    parts.append("</g>")
    width, height = 2 * MARGIN + longest * CHARACTER, 2 * MARGIN + len(lines) * LINE
    return picture(width, height, parts, "#0d1117")


def runs(line: str) -> Iterator[tuple[str, str]]:
    """Take a line with escape sequences apart: codes (empty: none) and text."""
    for codes, coloured, plain in re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m|([^\x1b]+)", line):
        yield codes, coloured or plain


def run(codes: str, text: str, column: int, line: int) -> Iterator[str]:
    """Draw text of one style; the escape codes are those of `STYLES`."""
    assert not codes or codes in STYLES.values(), f"no style of the inspector: {codes}"
    x, y, width = MARGIN + column * CHARACTER, MARGIN + line * LINE, len(text) * CHARACTER
    numbers = codes.split(";")
    attributes: dict[str, object] = {"textLength": f"{width:.1f}", "xml:space": "preserve"}
    if codes.startswith("48;5"):  # number 2 is the colour behind, number 5 that of the letters
        behind = BEHIND[numbers[2]]
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 1}" fill="{behind}"/>'
        )
        attributes["fill"] = LETTERS[numbers[5]]
    elif numbers[0] in LETTERS:
        attributes["fill"] = LETTERS[numbers[0]]
    if codes.endswith("1"):
        attributes["font_weight"] = "bold"
    if codes == STYLES["faint"]:
        attributes["opacity"] = "0.6"
    if text.strip():
        yield word(x, y + 14, text, **attributes)


PICTURES = {
    "torchsft/parallel/layouts.svg": draw_layouts,
    "tools/inspection/inspector.svg": draw_inspector,
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT, help="where to write")
    return parser.parse_args(argv)


def main() -> None:
    """Write all pictures."""
    directory = parse(sys.argv[1:]).directory
    for name, draw in PICTURES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(draw(), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
