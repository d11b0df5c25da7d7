"""The Chrome trace and the page of a plan."""

import itertools
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

from tools.markup import policy
from tools.planning.page import PAGE, RESERVED, Table, render, thin
from tools.planning.trace import write_trace
from torchsft.planning.memory import RESERVE, Memory
from torchsft.planning.simulation import GRADIENTS, PARAMETERS


def event(pp_rank, kind, begin, end, stage=None, microbatch=None):
    return SimpleNamespace(
        pp_rank=pp_rank, kind=kind, begin=begin, end=end, stage=stage, microbatch=microbatch
    )


EVENTS = [
    event(0, "forward", 0, 0.1, 0, 0),
    event(0, "wait", 0.1, 0.5),
    event(0, "backward", 0.5, 0.7, 0, 0),
    event(1, "wait", 0, 0.1),
    event(1, "forward", 0.1, 0.2, 1, 0),
    event(1, "input gradients", 0.2, 1 / 3, 1, 0),
    event(1, "weight gradients", 1 / 3, 0.4, 1, 0),
    event(1, "optimizer", 0.7, 0.75),
]


def test_a_trace_has_a_track_for_each_pipeline_rank(tmp_path):
    write_trace(tmp_path / "trace.json", EVENTS)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {0: "pipeline rank 0", 1: "pipeline rank 1"}
    for rank in names:
        drawn = [e for e in events if e["ph"] == "X" and e["tid"] == rank]
        kinds = [e.kind for e in EVENTS if e.pp_rank == rank]
        assert [e["cat"] for e in drawn] == kinds
        for one, after in itertools.pairwise(drawn):
            assert round(one["ts"] + one["dur"], 3) <= after["ts"]
    backward = next(e for e in events if e["name"] == "backward 0")
    assert (backward["ts"], backward["dur"]) == (500_000, 200_000)  # microseconds
    assert backward["args"] == {"stage": 0, "microbatch": 0}


class Elements(HTMLParser):
    """Tags and texts of a page whose elements are closed as they were opened."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_shows_memory_the_pipeline_and_tables_and_loads_nothing():
    held = {PARAMETERS: 30_000_000_000, GRADIENTS: 20_000_000_000}
    memory = Memory(1, held, 0, [{PARAMETERS: 30_000_000_000}, held])
    table = Table("Found", ("step", "command"), [("1 s", "torchrun <b>")], commands=True)
    title = "<script>alert(1)</script> & co"
    page = render(title, {"GPU": "<i>"}, [memory], 80_000_000_000, EVENTS, [table])
    found = Elements(page)
    names = [tag for tag, _ in found.tags]
    assert not {"script", "b", "i", "img", "link"} & {*names}
    assert {title, "<i>", "torchrun <b>", "pipeline rank 1: 55.5 GB"} <= {*found.texts}
    assert {"forward 0, stage 0: 0.0000 to 0.1000 s", RESERVED, GRADIENTS} <= {*found.texts}
    loads = [(tag, a) for tag, a in found.tags if {"src", "href", "style"} & {*a}]
    assert not loads and "url(" not in page and "@import" not in page
    (allowed,) = [a["content"] for _, a in found.tags if a.get("http-equiv")]
    assert allowed == policy(PAGE) and "unsafe" not in allowed and "default-src 'none'" in allowed
    # 55.5 GB end as far below the line of 80 GB as they should
    paths = [a["d"] for tag, a in found.tags if tag == "path"]
    top = min(float(y) for path in paths for y in re.findall(r" ([\d.]+)", path))
    (line,) = [float(a["y1"]) for tag, a in found.tags if tag == "line"]
    bottom = max(float(y) for path in paths for y in re.findall(r" ([\d.]+)", path))
    assert abs((bottom - top) / (bottom - line) - (RESERVE + sum(held.values())) / 80e9) < 0.01


def test_what_is_drawn_keeps_the_worst_moments():
    timeline = [{PARAMETERS: each % 7, GRADIENTS: each} for each in range(10_001)]
    drawn = thin(timeline)
    assert len(drawn) <= 400 and drawn[-1] == timeline[-1]
    assert max(sum(each.values()) for each in drawn) == max(sum(e.values()) for e in timeline)
