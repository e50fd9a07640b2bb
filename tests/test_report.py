"""The table, the pictures and the page say what came out, to people, programs and browsers."""

import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from report import Row, as_csv, as_page, as_table, curve

HOSTILE = (
    '</script><script>alert("x")</script><img src="http://example.org/x.png" onerror=alert(1)>'
)
BASELINES = {"uniform": 6.022, "unigram": 4.83, "bigram": 3.59, "trigram": 2.96, "xz": 2.52}
PASSAGE = "A passage\nof <b>42</b> & characters, “李雷”, 0123456."


def a_run(final: float) -> list[dict]:
    return [
        {
            "step": 10 * i,
            "share": i / 5,
            "seconds": 0.1 + 12 * i,
            "characters": 100_000 * i,
            "validation_loss": final + 3 / (i + 1),
            "sample": f"{HOSTILE} at {i}",
        }
        for i in range(6)
    ]


def a_row(name: str, loss: float, **known) -> Row:
    return Row(
        name,
        seeds=2,
        parameters=int(1e5 * 3 / loss),
        in_blocks=90_000,
        context=64,
        characters=500_000,
        readings=0.5,
        characters_per_second=8000,
        loss=loss,
        error=0.01,
        gap=0.1,
        written_per_second=700,
        runs=[a_run(loss), a_run(loss + 0.02)],
        surprise=[(i * 7 % 23) / 2.3 for i in range(len(PASSAGE))],
        **known,
    )


@pytest.fixture
def rows() -> list[Row]:
    return [
        a_row("mini", 1.539, behind=0.08, margin=0.02),
        a_row("small", 1.459, best=True, margin=0.0),
        a_row("a$b_{c$<i>", 1.462, behind=0.003, margin=0.009),
        Row("huge", failure="there is not enough memory " + "for a model of this size, " * 12),
    ]


def test_what_is_not_known_is_not_made_up(rows):
    unknown = a_row("mute", 2.0, margin=math.inf, failed_seeds=1)
    unknown.error, unknown.characters_per_second, unknown.runs = math.inf, math.nan, [[]]
    (line,) = (line for line in as_table([unknown], {}).splitlines() if "mute" in line)
    assert "mute, 2 of 3 seeds" in line
    assert "2.000 ± ?" in line
    assert not {"inf", "nan"} & set(line.replace("|", " ").split())
    page = as_page("One", [*rows, unknown], BASELINES, PASSAGE, [], {})
    assert ">mute</h3>" in page


@pytest.fixture
def page(rows) -> str:
    facts = {"command": "python compare.py book.txt --presets mini small", "text": HOSTILE}
    return as_page("Model sizes compared on book", rows, BASELINES, PASSAGE, ["± is."], facts)


def test_table(rows):
    lines = as_table(rows, BASELINES).splitlines()
    assert len(lines) == 2 + len(rows) + len(BASELINES)
    by_name = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")] for line in lines}
    small = by_name["small, 2 seeds"]
    assert "1.459 ± 0.010" in small
    assert f"{1.459 / math.log(2):.3f}" in small
    assert small[5] == "best"
    assert by_name["mini, 2 seeds"][5] == ""
    assert by_name["a$b_{c$<i>, 2 seeds"][5] == "not distinguishable"
    assert by_name["huge"][2].startswith("failed: there is not enough memory")
    assert f"{2.96 * math.log(2):.3f}" in by_name["trigram"]
    # A failure is as long as it has to be; all else is aligned.
    assert len({len(line) for line in lines if "failed" not in line}) == 1


def test_csv_is_for_programs(rows):
    by_name = {row["preset"]: row for row in csv.DictReader(io.StringIO(as_csv(rows, BASELINES)))}
    assert float(by_name["small"]["loss"]) == 1.459
    assert float(by_name["small"]["bits_per_character"]) == pytest.approx(1.459 / math.log(2))
    assert float(by_name["a$b_{c$<i>"]["behind_best"]) == 0.003
    assert by_name["huge"]["failure"] == rows[3].failure
    assert by_name["huge"]["loss"] == ""
    assert float(by_name["xz"]["loss"]) == pytest.approx(2.52 * math.log(2))


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def test_page_needs_nothing_else_and_nobody_else_writes_in_it(page):
    tags = Tags()
    tags.feed(page)
    names = [tag for tag, _ in tags.seen]
    assert names.count("script") == 2
    assert not {"img", "iframe", "i", "b", "object", "embed"} & set(names)
    for tag, attributes in tags.seen:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            # In a page, a picture may use its own parts.
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
    assert len(page.encode()) < 500_000


def test_page_shows_every_model(page):
    assert "small knows the validation part best: 1.459 nats per character." in page
    assert "a$b_{c$&lt;i&gt; is not distinguishable from it. huge failed." in page
    assert page.count("<svg ") == 3
    assert page.count('class="passage"') == 3


def test_picture_of_one_run():
    lines = [
        {"step": 100 * i, "training_loss": 2.5 / i if i else None, "validation_loss": 3 - i / 4}
        for i in range(5)
    ]
    picture = curve(lines).decode()
    assert picture.startswith("<?xml")
    assert {"validation", "training", "step"} <= set(re.findall(">([^<>]+)</text>", picture))
    assert curve(lines).decode() == picture


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
QUIET += " --disable-background-networking --disable-component-update --enable-logging=stderr"

# Shows a page in a frame of some width, uses it, and writes down what happens.
VISITOR = """<!DOCTYPE html><meta charset="utf-8">
<iframe id="frame" style="width: WIDTHpx; height: 900px; border: 0" srcdoc="PAGE"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("frame").onload = function () {
  const view = this.contentWindow, page = this.contentDocument, found = {};
  const all = selector => Array.from(page.querySelectorAll(selector));
  found.width = view.innerWidth;
  found.scroll_width = page.documentElement.scrollWidth;
  found.table_width = page.querySelector("table").scrollWidth;
  found.pictures = all("figure svg").map(svg => {
    const box = svg.getBoundingClientRect();
    return [box.left, box.right, box.height];
  });
  found.letters = Math.min(...all("figure svg text").map(text =>
    text.getBoundingClientRect().height));
  found.requests = view.performance.getEntriesByType("resource").map(entry => entry.name);
  const slider = page.getElementById("share");
  found.label = slider.labels[0].textContent;
  found.last_sample = page.querySelector("[data-sample]").textContent;
  slider.value = 0;
  slider.dispatchEvent(new view.Event("input"));
  found.first_sample = page.querySelector("[data-sample]").textContent;
  found.told = page.getElementById("told").textContent;
  all(".passage")[1].children[3].click();
  found.chosen = all(".chosen").length;
  found.likelihood = all(".likelihood")[0].textContent;
  page.getElementById("passages").dispatchEvent(
    new view.KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  found.next_likelihood = all(".likelihood")[0].textContent;
  // The contrast of all text, as WCAG 2.1 counts it.
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => {
    const alpha = top.length > 3 ? top[3] : 1;
    return [0, 1, 2].map(i => alpha * top[i] + (1 - alpha) * below[i]);
  };
  const light = color => color.map(c => c / 255).map(c =>
    c <= 0.03928 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4))
    .reduce((sum, c, i) => sum + [0.2126, 0.7152, 0.0722][i] * c, 0);
  const background = element => over(numbers(view.getComputedStyle(element).backgroundColor),
    element.parentElement ? background(element.parentElement) : [255, 255, 255]);
  const unseen = ["script", "style"];
  found.contrasts = all("body *").filter(element => !unseen.includes(element.localName)
    && Array.from(element.childNodes).some(child => child.nodeType === 3 && child.data.trim()))
    .map(element => {
      const style = view.getComputedStyle(element);
      const ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
      const paper = background(element);
      const [a, b] = [light(over(numbers(ink), paper)), light(paper)].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), element.tagName + " " + element.textContent.slice(0, 30)];
    });
  found.paper = background(page.body);
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_page_in_a_browser(page, width, theme):
    visitor = VISITOR.replace("WIDTH", str(width)).replace("PAGE", html.escape(page))
    Path("visitor.html").write_text(visitor, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(theme)}"
    words = [*QUIET.split(), scheme, f"--user-data-dir={Path('profile').resolve()}"]
    browser = subprocess.run(
        [
            CHROMIUM,
            *words,
            "--window-size=1400,1000",
            "--dump-dom",
            Path("visitor.html").resolve().as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    assert "CONSOLE" not in browser.stderr
    (written,) = re.findall('<pre id="found">(.*?)</pre>', browser.stdout, re.DOTALL)
    found = json.loads(html.unescape(written))
    assert found["width"] == width
    assert found["scroll_width"] <= width
    assert found["table_width"] < 1280
    assert len(found["pictures"]) == 3
    assert all(
        0 <= left < right <= width and height > 150 for left, right, height in found["pictures"]
    )
    assert found["letters"] > 9  # pixels, with what is above and below
    assert found["requests"] == []
    assert found["label"] == "How much of the run"
    assert found["last_sample"] == f"{HOSTILE} at 5"
    assert (found["first_sample"], found["told"]) == (f"{HOSTILE} at 0", "untrained")
    assert found["chosen"] == 3
    # Character 3 is "a", at 21 / 2.3 bits; the one after it "s", at 28 % 23 / 2.3.
    assert found["likelihood"] == '"a": 9.13 bits, 0.2 % likely'
    assert found["next_likelihood"].startswith('"s": 2.17 bits, 22 %')
    assert [pair for pair in found["contrasts"] if pair[0] < 4.5] == []
    assert (sum(found["paper"]) < 200) == (theme == "dark")
