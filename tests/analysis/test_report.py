"""The report: one file, nothing fetched, nothing of a reader's text taken for HTML."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
from helpers import browser

from prism_jax.analysis import report

PNG = b"\x89PNG\r\n\x1a\nnot really"


class Page(HTMLParser):
    """The text of a page, the addresses it asks for, and whether its tags are balanced."""

    VOID = {"meta", "img", "br"}

    def __init__(self, html: str):
        super().__init__()
        self.text, self.addresses, self.open = "", [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def render(summary, **changes) -> str:
    return report.render(summary, **{"figures": {}, "config": {}, "notes": []} | changes)


def test_the_report_says_what_a_reader_looks_for(summary):
    config = {"name": "digits_ipc10", "recover": {"iterations": 500, "pool": ["a", "b"]}}
    page = Page(render(summary, config=config, notes=["The pool is unbalanced."]))
    for words in (
        "digits_ipc10", "94.0 ± 1.0", "random real, hard labels", "3 student seeds",
        "git checkout 0123456789abcdef", "--config=configs/digits_ipc10.py", "0.10.2", "NPROC",
        "iterations", "500", "a, b", "The pool is unbalanced.", "shufflenet_v2_x0_5",
        "synthetic 0.812, initial 0.775, real 0.768", "3.06 MB", "best 95.0",
        "Trained with mse_gt + 0.1 cross entropy", "BatchNorm over 25 images", "Accuracy by class",
    ):  # fmt: skip
        assert words in page.text
    assert "None" not in page.text


def test_images_that_began_as_noise_are_beside_nothing(summary):
    assert "beside the images they began as" in Page(render(summary, figures={"grid": PNG})).text
    summary["recover"]["distance_from_initial"] = None
    text = Page(render(summary, figures={"grid": PNG})).text
    assert "they began as noise" in text and "beside the images" not in text


def test_the_report_needs_nothing_beside_it(summary):
    html = render(summary, figures={"mine": PNG, "grid": PNG})
    page = Page(html)
    assert len(page.addresses) == 2
    for address in page.addresses:
        head, _, data = address.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == PNG
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)
    assert html.index("Images</h2>") < html.index("mine</h2>")


def test_text_is_never_markup(summary):
    summary["config"] = "<script>alert(1)</script>"
    html = render(summary, notes=["a < b & c"], config={"recover": {"x": "<b>"}})
    assert "<script" not in html
    assert "a &lt; b &amp; c" in html
    assert "<b>" not in html.replace("<div><b>", "")


@pytest.mark.parametrize("upto", ["teachers", "recover", "relabel", "validate"])
def test_an_unfinished_run_has_a_report(summary, upto):
    stages = ["teachers", "recover", "relabel", "validate", "controls", "analyse"]
    for stage in stages[stages.index(upto) + 1 :]:
        del summary[stage]
    del summary["dataset"], summary["command"]
    summary["commit"] = None
    text = Page(render(summary)).text
    assert "None" not in text
    assert ("Accuracy" in text) == (upto == "validate")


def test_unknown_numbers_are_dashes(summary):
    summary["validate"]["resnet18"] = {"top1": None}
    summary["recover"]["images"] = None
    text = Page(render(summary)).text
    assert "None" not in text and "– %" not in text


def test_the_same_run_has_the_same_report(summary):
    assert render(summary, figures={"grid": PNG}) == render(summary, figures={"grid": PNG})


# Labels of the table of accuracies that have more lines than words.
BROKEN = """
[...document.querySelectorAll('.accuracies tbody th')].filter(cell => {
  const text = document.createRange()
  text.selectNodeContents(cell)
  const lines = new Set([...text.getClientRects()].map(line => line.top)).size
  return lines > cell.textContent.trim().split(/\\s+/).length
}).map(cell => cell.textContent.trim())
"""


def test_the_rows_labels_keep_their_words_on_a_phone(summary, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(render(summary))
    with browser.opened(tmp_path / "profile") as tab:
        tab.open(file, width=390, dark=False)
        assert tab.run("document.querySelectorAll('.accuracies tbody th').length") > 2
        assert tab.run(browser.OVERFLOWING) == [] and tab.run(BROKEN) == []
        # The twin: words that may be broken anywhere are.
        tab.run("document.querySelector('.accuracies').style.overflowWrap = 'anywhere', 0")
        tab.run(
            "document.querySelectorAll('.accuracies th')"
            ".forEach(cell => { cell.style.overflowWrap = 'inherit' }), 0"
        )
        assert "synthetic" in tab.run(BROKEN)
