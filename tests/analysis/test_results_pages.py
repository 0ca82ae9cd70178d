"""The numbers on the pages of docs/results are those of the records that stand beside them."""

from __future__ import annotations

import pathlib
import re

import pytest

from prism_jax import compare

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "results"
# What a page calls a student.
SPOKEN = {
    "shufflenet_v2": "shufflenet_v2_x0_5", "convnet (instance norm)": "convnet",
    "transformer": "vit",
}  # fmt: skip
PAGES = sorted(path.name.removesuffix("_records.json") for path in RESULTS.glob("*_records.json"))
Rows = list[dict[str, str]]


ACCURACY = re.compile(r"\d\d?\.\d( ± \d\d?\.\d)?|–")


def tables(text: str) -> list[Rows]:
    """The Markdown tables of accuracies: a row's cells by their column.

    Of one seed they have no deviation; a table that has anything else is none of them.
    """
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        lines = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in block.split("\n")]
        header, _, *rows = filter(None, lines)
        if all(ACCURACY.fullmatch(cell) for row in rows for cell in row[1:]):
            found.append([dict(zip(header[1:], row[1:], strict=True)) for row in rows])
    return found


def astray(page: str, computed: str) -> Rows:
    """The rows of a page that are not in the tables of its records."""
    said = [row for table in tables(computed) for row in table]
    ipcs = {column.partition(", ")[0] for row in said for column in row}

    def is_there(row: dict[str, str]) -> bool:
        return any(
            all(other.get(f"{ipc}, {SPOKEN.get(s, s)}") == cell for s, cell in row.items())
            for other in said for ipc in ipcs
        )  # fmt: skip

    rows = [row for table in tables(page) for row in table]
    assert rows
    return [row for row in rows if not is_there(row)]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_says_what_its_records_do(name, tmp_path):
    page, records = (RESULTS / f"{name}.md").read_text(), RESULTS / f"{name}_records.json"
    assert compare.main([f"--records={records}", f"--workdir={tmp_path}"]) == 0
    computed = (tmp_path / "table.md").read_text()
    assert astray(page, computed) == []
    # The twin: one digit of one cell.
    number = re.search(r"(?<=\| )\d\d\.\d(?=[ *|])", page)
    assert number
    other = f"{float(number[0]) + 0.1:.1f}"
    wrong = page[: number.start()] + other + page[number.end() :]
    assert len(astray(wrong, computed)) == 1
