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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.debug_task import write_debug_data, write_debug_model
from tools.inspection.terminal import STYLES
from tools.markup import picture, rectangle, word
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
# In pixels.
RANK_WIDTH = 42
AXIS_HEIGHT = 24
RANKS_LEFT = 244
VIEW_GAP = 12

SHOWN = "chats.jsonl:2"  # the conversation that the inspector's picture shows
# In pixels.
CHARACTER_WIDTH = 7.8
LINE_HEIGHT = 19
MARGIN = 14
# The terminal's colours of letters, and behind them.
LETTERS = {
    "31": "#ff7b72",
    "33": "#e3b341",
    "34": "#79c0ff",
    "36": "#56d4dd",
    "157": "#afffaf",
}
BEHIND = {"22": "#005f00"}


# ---------------------------------------------------------------- layouts


def draw_layouts() -> str:
    """Draw how the axes divide the ranks of `LAYOUT`, one strip for each axis."""
    meshes = mesh_sizes(LAYOUT, RANKS)
    y = 20.0
    parts = [word(10, y, "rank", font_weight="bold")]
    for rank in range(RANKS):
        middle = RANKS_LEFT + (rank + 0.5) * RANK_WIDTH
        parts.append(word(middle, y, str(rank), text_anchor="middle"))
    for view, axes in VIEWS.items():
        sizes = meshes[view]
        coordinates = np.unravel_index(range(RANKS), tuple(sizes.values()))
        numbers = dict(zip(sizes, coordinates, strict=True))
        y += VIEW_GAP
        for axis, meaning in axes.items():
            line = y + 17
            parts.append(word(10, line, axis, font_weight="bold"))
            parts.append(word(90, line, meaning, fill="#666666"))
            parts += draw_axis(numbers[axis].tolist(), y)
            y += AXIS_HEIGHT
    width = RANKS_LEFT + RANKS * RANK_WIDTH + 10
    return picture(
        width,
        y + 10,
        "#ffffff",
        parts,
        font_family="sans-serif",
        font_size=13,
        fill="#222222",
    )


def draw_axis(numbers: Sequence[int], y: float) -> Iterator[str]:
    """Draw the numbers of all ranks on an axis; neighbours with the same one share a box."""
    first = 0
    for number, group in itertools.groupby(numbers):
        ranks = len(list(group))
        x = RANKS_LEFT + first * RANK_WIDTH
        width = ranks * RANK_WIDTH
        colour = COLOURS[number % len(COLOURS)]
        yield rectangle(x + 1, y + 1, width - 2, AXIS_HEIGHT - 2, rx=4, fill=colour)
        yield word(x + width / 2, y + 17, str(number), fill="#ffffff", text_anchor="middle")
        first += ranks


# ---------------------------------------------------------------- the inspector


def write_conversations(directory: Path) -> None:
    """Write chats.jsonl: in one conversation an answer is not trained, one row has a key that means
    nothing, and the last one is there twice.
    """
    path, _ = write_debug_data(directory, train=40, held_out=1)
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows[1]["messages"][4]["weight"] = 0
    rows[3]["source"] = "forum"
    rows.append(rows[6])
    with open(directory / "chats.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def inspector_output() -> str:
    """Return what the inspector prints of these conversations, in colour."""
    command = [sys.executable, str(ROOT / "tools" / "inspect_data.py")]
    command += ["--model.path", "model", "--data.train", "chats.jsonl", "--data.seq-len", "512"]
    command += ["--show", SHOWN, "--color", "always"]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_debug_model(directory / "model")
        write_conversations(directory)
        cache = str(directory / "cache")
        ended = subprocess.run(
            command,
            cwd=directory,
            env=os.environ | {"TORCHSFT_CACHE": cache, "PYTHONUTF8": "1"},
            check=True,
            capture_output=True,
            encoding="utf-8",
        )
    return ended.stdout


def draw_inspector() -> str:
    """Draw what the inspector prints on a terminal."""
    lines = inspector_output().rstrip("\n").split("\n")
    parts = []
    columns = 0
    for number, line in enumerate(lines):
        column = 0
        for style, text in styled(line):
            parts += draw_run(style, text, column, number)
            column += len(text)
        columns = max(columns, column)
    return picture(
        2 * MARGIN + columns * CHARACTER_WIDTH,
        2 * MARGIN + len(lines) * LINE_HEIGHT,
        "#0d1117",
        parts,
        font_family="ui-monospace, Menlo, Consolas, monospace",
        font_size=13,
        fill="#d0d7de",
    )


def styled(line: str) -> Iterator[tuple[str, str]]:
    """Take a line apart into runs of one style: its escape codes (empty: none) and its text."""
    pattern = r"\x1b\[([\d;]+)m(.*?)\x1b\[0m|([^\x1b]+)"
    for codes, coloured, plain in re.findall(pattern, line):
        yield codes, coloured or plain


def draw_run(codes: str, text: str, column: int, line: int) -> Iterator[str]:
    """Draw text of one style, at a column of a line."""
    assert not codes or codes in STYLES.values(), f"no style of the inspector: {codes}"
    x = MARGIN + column * CHARACTER_WIDTH
    y = MARGIN + line * LINE_HEIGHT
    width = len(text) * CHARACTER_WIDTH
    # Spaces stay, and the text is as wide as on a terminal, whatever the font.
    attributes: dict[str, object] = {"xml:space": "preserve", "textLength": width}
    numbers = codes.split(";")
    letters = numbers[0]
    if numbers[:2] == ["48", "5"]:  # 48;5;BEHIND;38;5;LETTERS
        yield rectangle(x, y, width, LINE_HEIGHT - 1, fill=BEHIND[numbers[2]])
        letters = numbers[5]
    if letters in LETTERS:
        attributes["fill"] = LETTERS[letters]
    if numbers[-1] == "1":
        attributes["font_weight"] = "bold"
    if codes == STYLES["faint"]:
        attributes["opacity"] = 0.6
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
