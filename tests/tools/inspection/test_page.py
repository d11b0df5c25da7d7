"""The page: what it says, that data cannot become anything else than text, and how a real browser
shows it.
"""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.data import chat
from tests.tools.inspection.samples import sample, source
from tools.inspection import lint, page, report
from tools.inspection.lint import Linter
from tools.inspection.reading import Reader
from torchsft.config import Data

TOKENIZER = chat.byte_tokenizer(chat.CHATML)
START = "<|im_start|>assistant\n"
HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x "
    "onerror=document.title='taken'><!-- \u2028 ]]>"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def inspect(*sources, seq_len=256):
    reader, data = Reader(TOKENIZER), Data(seq_len=seq_len)
    findings = report.lint(
        Linter(reader, mask="assistant", seq_len=seq_len, vocab_size=None), sources, iter
    )
    training = {"global_batch_size": 2, "seed": 0, "steps": None, "epochs": None}
    plan = report.plan([s for s in sources if not s.evaluation], data, **training)
    return report.Inspection(
        "/models/" + HOSTILE, data, training, reader, list(sources), findings, plan
    )


def turn(said, answer, weight=1.0):
    return sample(
        TOKENIZER,
        f"<|im_start|>user\n{said}<|im_end|>\n",
        START,
        (f"{answer}<|im_end|>", weight),
        "\n",
    )


@pytest.fixture(scope="module")
def inspection():
    chats = source(
        turn("hello", "the answer is 🙂"),
        turn(HOSTILE, HOSTILE),
        turn("you and me", ".", 0.5),
        turn("x" * 150, "end" * 20),
    )
    return inspect(
        chats,
        source(
            turn("hello", "other answer"), name=f"b{HOSTILE}.jsonl", format="sharegpt", weight=2.0
        ),
    )


class Elements(html.parser.HTMLParser):
    """What a browser's parser sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.attributes = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and data.strip():
            self.scripts.append(data)


def data_of(text):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def test_data_cannot_become_markup(inspection):
    text = page.render(inspection)
    empty = Elements(page.render(inspect(source(turn("hello", "you and me")))))
    full = Elements(text)
    assert full.tags == empty.tags and full.attributes == empty.attributes
    assert HOSTILE in json.dumps(data_of(text), ensure_ascii=False).replace("\\u2028", "\u2028")


def test_the_script_writes_text_only():
    script = page.TEMPLATE.read_text()
    for unsafe in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
    ):
        assert unsafe not in script


def test_nothing_is_loaded_and_only_the_pages_own_script_runs(inspection):
    text = page.render(inspection)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("style", "script"):
        digest = hashlib.sha256(
            re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1].encode()
        ).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page.TEMPLATE.read_text())


def test_the_page_holds_tokens_weights_turns_and_rows(inspection):
    data = data_of(page.render(inspection))
    first, _, half, _, other = data["samples"]
    original = inspection.sources[0].samples[0]
    assert first["id"] == "chat.jsonl:1" and first["tokens"] == original.tokens.tolist()
    [[start, end, weight]] = first["weights"]
    assert (
        weight == 1.0
        and inspection.reader.text(original.tokens[start:end]) == "the answer is 🙂<|im_end|>"
    )
    assert [role for role, *_ in first["blocks"]] == ["user", "assistant"]
    assert half["weights"][0][2] == 0.5 and half["findings"][0][0] == "near-empty"
    assert other["source"] == 1 and data["sources"][1]["format"] == "sharegpt"
    # rows of an epoch: samples of weight 1 once, of weight 2 twice; `row` says where a sample
    # begins in the first of them
    placed = sorted(i for row in data["rows"] for i in row)
    assert placed == [0, 1, 2, 3, 4, 4]
    for i, each in enumerate(data["samples"]):
        row, at = each["row"]
        before = data["rows"][row][: data["rows"][row].index(i)]
        assert at == sum(len(data["samples"][j]["tokens"]) for j in before)
    text = "".join(_pieces(data, first))
    assert text == inspection.reader.text(original.tokens)


def _pieces(data, shown):
    joined, i = {at: (n, text) for at, n, text in shown.get("joined", [])}, 0
    while i < len(shown["tokens"]):
        n, text = joined.get(i) or (1, data["vocabulary"][str(shown["tokens"][i])])
        yield text
        i += n


def test_refused_rows_are_on_the_page(inspection):
    finding = page.Finding(
        "not-json", "chat.jsonl", "/data/chat.jsonl, line 9", f"not JSON {HOSTILE}"
    )
    data = data_of(
        page.render(
            report.Inspection(**{**vars(inspection), "findings": [*inspection.findings, finding]})
        )
    )
    assert (
        data["faults"] == [["not-json", "/data/chat.jsonl, line 9", f"not JSON {HOSTILE}"]]
        and data["errors"] == 1
    )


def test_of_many_samples_those_with_findings_and_the_first_rows_are_shown(monkeypatch):
    monkeypatch.setattr(page, "MOST_SAMPLES", 10)
    many = inspect(
        source(*(turn(f"question {i}", "." if i == 77 else f"answer {i}") for i in range(100)))
    )
    data = data_of(page.render(many))
    assert len(data["samples"]) == 10 and "chat.jsonl:78" in [
        each["id"] for each in data["samples"]
    ]
    assert (
        data["shown"] == "10 of 100 samples are on this page" and data["totals"]["samples"] == 100
    )
    assert len(data["rows"]) >= 1 and all(i < 10 for row in data["rows"] for i in row)


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(inspection, tmp_path_factory):
    """`browser(address, *flags)`: the page under `#address`, opened with these flags; standard
    output.
    """
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(
            "no chromium or chrome is installed, and the page is looked at in a real browser here"
        )
    directory = tmp_path_factory.mktemp("browser")
    (directory / "page.html").write_text(page.render(inspection), encoding="utf-8")

    def open_page(address, *flags):
        fixed = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=1280,900",
        ]
        fixed += [
            f"--user-data-dir={directory / 'profile'}",
            "--virtual-time-budget=5000",
            "--force-device-scale-factor=1",
        ]
        url = (directory / "page.html").as_uri() + "#" + address
        done = subprocess.run(
            [program, *fixed, *flags, url], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    open_page.directory = directory
    return open_page


def test_a_browser_shows_hostile_text_as_text(browser):
    dom = browser("sample=chat.jsonl:2", "--dump-dom")
    assert "<title>Data inspector</title>" in dom  # no script of the data has run
    shown = re.sub(r"<[^>]*>", "", dom.partition('class="turns"')[2].partition("</main>")[0])
    assert (
        shown.count(
            "&lt;/script&gt;&lt;script&gt;document.title='taken'&lt;/script&gt;&lt;img src=x"
        )
        == 2
    )
    assert "U+2028" in shown and "<img" not in dom


def test_a_browser_marks_what_is_trained(browser):
    dom = (
        browser("sample=chat.jsonl:1", "--dump-dom")
        .partition('class="turns"')[2]
        .partition("</main>")[0]
    )
    trained = re.findall(
        r'<span class="([^"]*)" '
        r'data-i="\d+"[^>]*>(.*?)</span>(?=<span|</span>|</div>|\s)',
        dom,
    )
    said = "".join(re.sub(r"<[^>]*>", "", text) for names, text in trained if "t" in names.split())
    assert said == "the answer is 🙂&lt;|im_end|&gt;"
    assert "\u00d70.5" in browser("sample=chat.jsonl:3", "--dump-dom")


def test_a_browser_filters_by_reason_and_shows_rows(browser):
    dom = browser("reason=near-empty", "--dump-dom")
    assert dom.count('class="item"') == 1 and "1 of 5 samples" in dom and "Near-empty answer" in dom
    assert "document 1 of" in browser("view=rows", "--dump-dom")
    assert "samples to train on" in browser("view=overview", "--dump-dom")


@pytest.mark.parametrize(
    ("theme", "trained", "paper"), [("light", "c9ecdb", "f6f6f3"), ("dark", "124233", "121416")]
)
def test_a_screenshot_has_the_colour_of_trained_text(browser, theme, trained, paper):
    file = browser.directory / f"{theme}.png"
    browser(f"theme={theme}&sample=chat.jsonl:4", f"--screenshot={file}")
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    assert len(pixels) == 1280 * 900

    def area(colour):
        return (pixels == np.frombuffer(bytes.fromhex(colour), np.uint8)).all(1).sum()

    assert area(paper) > 200_000  # the page's background
    assert area(trained) > 3_000  # two lines of marked text


def test_notes_have_a_level_of_their_own_and_are_no_refused_rows(monkeypatch):
    monkeypatch.setattr(lint, "NOTES", {"known-thing"})
    found = inspect(source(turn("hello", "you and me")))
    found.findings.append(
        lint.Finding("known-thing", "chat.jsonl", "chat.jsonl", "key x, in 3 rows")
    )
    found.findings.append(
        lint.Finding("known-thing", "chat.jsonl", "chat.jsonl:1", "two users in a row")
    )
    data = data_of(page.render(found))
    assert (
        data["reasons"]["known-thing"]["level"] == "note"
        and data["reasons"]["known-thing"]["count"] == 2
    )
    assert data["samples"][0]["findings"] == [["known-thing", "two users in a row"]]
    assert data["faults"] == [] and (data["errors"], data["warnings"]) == (0, 0)
