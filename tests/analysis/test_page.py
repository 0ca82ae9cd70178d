"""The page of several runs: one file, nothing fetched, and in a real browser as it should be."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from helpers import browser
from PIL import Image

from prism_jax.analysis import page, words
from prism_jax.analysis.figures import Strip, in_forms, strips
from prism_jax.analysis.page import Picture, Section, Table, figure, word

LONG = "a_run_with_a_name_that_no_screen_of_a_phone_is_wide_enough_for/ipc10/seed0"


def picture(name: str, width: int, *, is_chart: bool) -> Picture:
    file = io.BytesIO()
    Image.new("RGB", (width, 300), "white").save(file, "PNG")
    return Picture(name, f"Figure {name}", "What it is.", {"png": file.getvalue()}, is_chart)


@pytest.fixture
def html() -> str:
    values = [3.0, None, 11.0, 2.5]
    rows = [[word(f"row {i}"), word(LONG), figure(x, str)] for i, x in enumerate(values)]
    many = [[word(f"class {i}"), *(figure(i / 7 + j, "{:.3f}".format) for j in range(14))]
            for i in range(60)]  # fmt: skip
    first = Table("First", ["run", "set", "top-1, %"], rows, "A note.")
    sections = [
        Section("Accuracy", "Top-1.", [first]),
        Section("Images & more", "See.", [
            picture("chart", 1620, is_chart=True), picture("grid", 1200, is_chart=False),
            Table("Many", ["class", *(f"number {j}" for j in range(14))], many),
        ]),
    ]  # fmt: skip
    return page.render(
        LONG, f"{LONG}: <prism>", sections, headline=[("93.1 ± 0.4 %", f"top-1, {LONG}")],
        notes=["UMAP: left out. A package & more."],
    )  # fmt: skip


def test_it_needs_nothing_beside_it(html):
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)", html)
    assert len(addresses) == 4
    for address in addresses:
        assert address.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?://|@import|url\(|<link|<script src", html)
    assert "&lt;prism&gt;" in html and "<prism>" not in html and "None" not in html
    assert base64.b64decode(addresses[-1].partition(",")[2])[:4] == b"\x89PNG"
    assert [a for a in addresses if a[0] == "#"] == ["#accuracy", "#images-more"]
    assert all(f'id="{a[1:]}"' in html for a in addresses if a[0] == "#")


def test_numbers_are_those_of_the_tables_as_fractions():
    rows = [[word("a"), figure(0.5, words.percent)], [word("b"), figure(None, str)]]
    table = Table("First", ["run", "top-1, %"], rows)
    found = page.numbers([Section("Accuracy", "", [table, picture("x", 9, is_chart=True)])])
    assert found == {"Accuracy/First": [{"run": "a", "top-1": 0.5}, {"run": "b", "top-1": None}]}
    assert [row[1].text for row in rows] == ["50.0", "–"]


def test_strips_stand_in_rows_in_any_format():
    images = [np.full((8, 8, 1), 20 * i, np.uint8) for i in range(6)]
    rows = [Strip("zero", [images[:3]]), Strip("one", [images[3:]])]
    found = in_forms(strips, rows, columns=("start", "5", "end"))
    assert found["svg"].startswith(b"<?xml") and found["pdf"].startswith(b"%PDF")
    assert found == in_forms(strips, rows, columns=("start", "5", "end"))  # nothing of the moment
    canvas = np.asarray(Image.open(io.BytesIO(found["png"])).convert("L"))
    for i in (1, 2, 3, 4, 5):
        assert (canvas == 20 * i).sum() >= 104 * 104  # enlarged 13 times


SHOWN = (
    "[...document.querySelectorAll('#accuracy tbody tr')].filter(r => !r.hidden)"
    ".map(r => r.cells[0].textContent).join()"
)


def test_a_browser_shows_it_on_a_phone_and_in_the_dark(html, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(html)
    light = {}
    with browser.opened(tmp_path / "profile") as tab:
        for width in (390, 1200):
            for dark in (False, True):
                tab.open(file, width=width, dark=dark)
                assert tab.run("innerWidth") == width
                assert tab.run(browser.OVERFLOWING) == []
                shot = Image.open(io.BytesIO(tab.screenshot())).convert("L")
                assert shot.width == width and shot.height > 900
                light[width, dark] = np.asarray(shot).mean()
            assert light[width, True] < 100 < 200 < light[width, False]

        # The twin: something that is too wide is seen.
        tab.open(file, width=390, dark=False)
        tab.run("document.querySelector('h1').style.overflowWrap = 'normal', 0")
        assert "the page" in tab.run(browser.OVERFLOWING)

        # Sorted by numbers, the unknown last either way; then filtered by words.
        click = "document.querySelectorAll('#accuracy thead button')[{}].click()"
        tab.run(click.format(2))
        assert tab.run(SHOWN) == "row 2,row 0,row 3,row 1"
        tab.run(click.format(2))
        assert tab.run(SHOWN) == "row 3,row 0,row 2,row 1"
        tab.run(click.format(0))
        assert tab.run(SHOWN) == "row 0,row 1,row 2,row 3"
        tab.run(
            "(i => { i.value = 'ROW 2.5'; i.dispatchEvent(new Event('input')) })"
            "(document.querySelector('#accuracy input'))"
        )
        assert tab.run(SHOWN) == "row 3"
        assert tab.run("document.querySelector('#accuracy [role=status]').textContent") == (
            "1 of 4 rows"
        )
