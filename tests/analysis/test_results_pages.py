"""The numbers on the pages of docs/results are those of the records that stand beside them."""

from __future__ import annotations

import functools
import pathlib
import re

import pytest

from prism_jax import compare
from prism_jax.analysis import cells, comparison, expenses
from prism_jax.analysis.intervals import Drawn, Interval
from prism_jax.data import workdir

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "results"
# What a page calls a student.
SPOKEN = {
    "shufflenet_v2": "shufflenet_v2_x0_5", "convnet (instance norm)": "convnet",
    "transformer": "vit",
}  # fmt: skip
PAGES = sorted(path.name.removesuffix("_records.json") for path in RESULTS.glob("*_records.json"))
Rows = list[dict[str, str]]
FULL = "full real"

FEWER = re.compile(r" \(\d+ of \d+\)$")  # seeds, where other rows have more
ACCURACY = re.compile(r"\d\d?\.\d( ± \d\d?\.\d)?( \(\d+ of \d+\))?|–")


def blocks(text: str) -> list[list[list[str]]]:
    """All Markdown tables: the cells of their lines, without the line of alignments."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.split("\n")]
        header, _, *rows = filter(None, lines)
        found.append([header, *rows])
    return found


def tables(text: str) -> list[Rows]:
    """The Markdown tables of accuracies: a row's cells by their column.

    Of one seed they have no deviation; a table that has anything else is none of them.
    """
    plain = [[[cell.strip("* ") for cell in line] for line in block] for block in blocks(text)]
    return [
        [dict(zip(header[1:], row[1:], strict=True)) for row in rows]
        for header, *rows in plain
        if all(ACCURACY.fullmatch(cell) for row in rows for cell in row[1:])
    ]


def costs(text: str) -> list[dict[str, dict[str, str]]]:
    """The tables of costs: a row's seconds by its label and the stage."""
    return [
        {row[0]: {h: c for h, c in zip(header, row, strict=True) if h in expenses.STAGES}
         for row in rows}
        for header, *rows in blocks(text) if set(expenses.STAGES) <= set(header)
    ]  # fmt: skip


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
    for table in costs(page):
        assert any(table.items() <= found.items() for found in costs(computed))


def test_costs_are_read_from_records_of_before_networks_were_told():
    records = workdir.read_record(RESULTS / "digits_generated_records.json")
    assert "squeeze" in records["cells"][0]["costs"]["synthetic"]["seconds"]  # twin: as they are
    entries, _ = cells.from_records(records)
    assert expenses.cost_of("seconds", entries, "synthetic") is expenses.COSTS["seconds"]
    [page] = costs((RESULTS / "digits_generated.md").read_text())
    assert page["d4m"]["squeeze"] == "3 min 10 s" and page["prism"]["squeeze"] == "53 s"


@pytest.mark.parametrize("name", PAGES)
def test_the_best_of_a_column_is_bold_and_so_is_its_equal(name):
    entries, _ = cells.from_records(workdir.read_record(RESULTS / f"{name}_records.json"))
    columns = [
        {label: {student: values for (i, student), values in found.items() if i == ipc}
         for label, found in grid.rows.items()}
        for grid in comparison.grids(entries) for ipc in {ipc for ipc, _ in grid.columns}
    ]  # fmt: skip
    checked, page = 0, (RESULTS / f"{name}.md").read_text()
    for header, *rows in blocks(page):
        for at, spoken in enumerate(header[1:], 1):
            bold = {row[0] for row in rows if row[at].startswith("**")}
            shown = {row[0]: FEWER.sub("", row[at].replace("*", "")) for row in rows}
            student = SPOKEN.get(spoken, spoken)
            for of_ipc in columns:
                exact = {
                    comparison.spread(values): round(sum(values) / len(values), 9)
                    for by_student in of_ipc.values() if (values := by_student.get(student))
                }  # fmt: skip
                if not bold or not set(shown.values()) <= exact.keys():
                    continue
                among = [shown, {row: cell for row, cell in shown.items() if FULL not in row}]
                best = [max(exact[cell] for cell in cells_of.values()) for cells_of in among]
                assert bold in [
                    {row for row, cell in cells_of.items() if exact[cell] == most}
                    for cells_of, most in zip(among, best, strict=True)
                ]
                checked += 1
    assert checked or "| **" not in page


CONFIDENT, MEDOIDS = "most confident real, soft labels", "real medoids in features, soft labels"
RANDOM, HARD = "random real, soft labels", "random real, hard labels"


@pytest.mark.parametrize(
    ("label", "other", "student", "said"),
    [
        ("psm", CONFIDENT, "convnet_d3", "7.7 [4.3, 11.1]"),
        ("fadrm", CONFIDENT, "convnet_d3", "7.4 [4.1, 10.7]"),
        ("prism_plus", CONFIDENT, "convnet_d3", "5.7 [3.0, 8.6]"),
        ("prism", CONFIDENT, "convnet_d3", "4.3 [1.0, 7.5]"),
        ("fadrm", MEDOIDS, "resnet20", "-0.9 [-4.3, +2.9]"),
        ("prism_plus", MEDOIDS, "resnet20", "-1.5 [-4.5, +1.5]"),
        ("psm", MEDOIDS, "resnet20", "-1.7 [-5.9, +2.7]"),
        (RANDOM, "prism", "resnet20", "4.5 [0.8, 8.2]"),
        ("delt", CONFIDENT, "convnet_d3", "4.6 [1.1, 8.1]"),
        ("edc", CONFIDENT, "convnet_d3", "4.5 [1.1, 8.0]"),
        ("prism_other", "prism_self", "resnet20", "5.2 [1.7, 8.7]"),
        ("prism_other", "prism_self", "convnet_d3", "0.8 [-2.4, +4.4]"),
        ("prism", "prism_self", "resnet20", "1.5 [-1.1, +4.1]"),
        ("prism_other", "prism", "resnet20", "3.7 [0.8, 6.9]"),
        ("prism", "prism_self", "convnet_d3", "1.0 [-0.9, +3.0]"),
        ("prism", "prism_other", "convnet_d3", "0.2 [-2.6, +2.9]"),
        ("delt", "prism", "resnet20", "4.3 [1.2, 7.3]"),
        ("rded", "prism", "resnet20", "5.0 [1.7, 8.2]"),
        ("delt", RANDOM, "resnet20", "-0.1 [-3.9, +3.7]"),
        ("rded", RANDOM, "resnet20", "0.5 [-2.5, +3.3]"),
        (RANDOM, "dwa", "convnet_d3", "5.2 [0.3, 9.7]"),
        (RANDOM, "rded", "convnet_d3", "5.9 [3.2, 8.6]"),
        (MEDOIDS, RANDOM, "resnet20", "3.7 [0.9, 6.4]"),
        (RANDOM, HARD, "resnet20", "5.3 [2.4, 8.3]"),
        (RANDOM, HARD, "convnet_d3", "-1.8 [-5.9, +2.4]"),
        ("psm", "prism", "resnet20", "6.4 [1.8, 11.1]"),
        ("fadrm", "prism", "resnet20", "7.3 [4.3, 10.2]"),
        ("psm", "prism", "convnet_d3", "3.4 [0.4, 6.3]"),
        ("prism_plus", "prism", "resnet20", "6.6 [3.1, 10.2]"),
        ("prism_plus", "prism", "convnet_d3", "1.4 [-1.4, +4.3]"),
    ],
)
def test_the_intervals_that_cifar10_quotes(label, other, student, said):
    quoted("cifar10", 10, student, label, other, said)


@pytest.mark.parametrize(
    ("label", "other", "student", "said"),
    [
        ("edc", RANDOM, "resnet20", "1.2 [-1.1, +3.4]"),
        ("prism_committee", RANDOM, "convnet_d3", "2.9 [0.5, 5.2]"),
        ("prism", RANDOM, "convnet_d3", "2.4 [-0.1, +4.9]"),
        (CONFIDENT, "prism_plus", "resnet20", "2.3 [0.4, 4.1]"),
        (CONFIDENT, "psm", "resnet20", "6.4 [2.3, 10.3]"),
        (CONFIDENT, "prism", "resnet20", "3.5 [-0.3, +7.3]"),
        ("prism", "psm", "convnet_d3", "5.4 [1.5, 9.7]"),
        ("prism_other", "prism_self", "resnet20", "2.7 [0.5, 5.0]"),
        ("prism_other", "prism_self", "convnet_d3", "0.0 [-2.0, +1.9]"),
        (RANDOM, "psm", "resnet20", "3.8 [0.4, 7.0]"),
        (RANDOM, "rded", "convnet_d3", "3.6 [1.3, 6.1]"),
        (RANDOM, HARD, "resnet20", "1.0 [-1.8, +3.7]"),
        (RANDOM, HARD, "convnet_d3", "2.1 [-1.2, +5.1]"),
    ],
)
def test_the_intervals_that_one_image_per_class_quotes(label, other, student, said):
    quoted("cifar10_ipc1", 1, student, label, other, said)


@pytest.mark.parametrize(
    ("set_", "other", "student", "said"),
    [
        (("prism", 20), ("prism", 25), "resnet20", "1.9 [-0.8, +4.5]"),
        ((RANDOM, 40), (RANDOM, 10), "convnet_d3", "4.0 [1.9, 6.3]"),
        (("prism", 10), (RANDOM, 10), "convnet_d3", "9.0 [5.7, 12.4]"),
        (("prism", 40), (RANDOM, 40), "convnet_d3", "5.1 [2.0, 8.4]"),
        ((RANDOM, 10), ("prism", 10), "resnet20", "6.6 [3.1, 9.9]"),
        ((RANDOM, 40), ("prism", 40), "resnet20", "5.1 [-0.9, +11.2]"),
    ],
)
def test_the_intervals_that_crops_quote(set_, other, student, said):
    drawn = _of_crops(student)
    is_quoted("cifar10_crop", drawn.difference(set_, other), said)


def test_no_crop_of_prism_is_certainly_another_than_a_quarter():
    crops = (10, 15, 20, 30, 40)
    held = [
        _of_crops(student).difference(("prism", crop), ("prism", 25)).holds_zero
        for student in ("resnet20", "convnet_d3") for crop in crops
    ]  # fmt: skip
    assert held == [True] * 10


@pytest.mark.parametrize(
    ("label", "other", "student", "said"),
    [
        ("batch_10", "batch_100", "convnet_d3", "1.8 [-0.6, +4.1]"),
        ("batch_100", "batch_10", "resnet20", "0.8 [-1.7, +3.3]"),
        ("fixed_50", "fixed_10", "convnet_d3", "2.6 [0.0, 5.0]"),
        ("fixed_10", "fixed_50", "resnet20", "1.9 [-1.0, +4.9]"),
        ("fixed_50", "batch_50", "convnet_d3", "3.1 [-0.9, +7.1]"),
        ("batch_100", RANDOM, "convnet_d3", "6.0 [3.0, 9.0]"),
        (RANDOM, "batch_100", "resnet20", "5.6 [2.0, 9.1]"),
    ],
)
def test_the_intervals_that_batches_quote(label, other, student, said):
    quoted("cifar10_batch", 10, student, label, other, said)


def test_no_size_of_a_drawn_batch_and_no_fixed_teacher_is_certainly_another():
    sizes = (10, 20, 50, 100)
    pairs = [(f"batch_{size}", "batch_10") for size in sizes[1:]]
    pairs += [(f"fixed_{size}", f"batch_{size}") for size in sizes]
    held = [
        _drawn("cifar10_batch", 10, student).difference(*pair).holds_zero
        for student in ("resnet20", "convnet_d3") for pair in pairs
    ]  # fmt: skip
    assert held == [True] * 14


@pytest.mark.parametrize(
    ("label", "other", "student", "said"),
    [
        ("prism_other", "prism", "resnet20", "1.0 [-1.2, +3.1]"),
        ("prism_other", "prism_self", "resnet20", "1.1 [-1.1, +3.5]"),
        ("prism_all_at_once", "prism_class", "convnet_d3", "3.9 [1.4, 6.5]"),
        ("prism_self", "prism_class", "convnet_d3", "4.4 [0.3, 8.2]"),
        ("prism", "prism_class", "convnet_d3", "4.0 [-0.1, +7.8]"),
        ("prism_class", RANDOM, "convnet_d3", "2.1 [-0.8, +5.1]"),
        ("prism", RANDOM, "convnet_d3", "6.1 [0.8, 11.0]"),
        ("prism_every_iteration", "prism", "resnet20", "0.7 [-1.6, +3.3]"),
        ("prism_every_iteration", "prism", "convnet_d3", "-0.9 [-2.5, +0.8]"),
        ("prism", CONFIDENT, "convnet_d3", "4.9 [1.8, 8.1]"),
        (CONFIDENT, "prism", "resnet20", "5.0 [1.2, 8.8]"),
    ],
)
def test_the_intervals_that_variants_quote(label, other, student, said):
    quoted("cifar10_variants", 10, student, label, other, said)


@pytest.mark.parametrize(
    ("label", "other", "student", "said"),
    [
        (RANDOM, "prism", "resnet20", "17.5 [13.9, 21.0]"),
        (RANDOM, "psm", "resnet20", "9.5 [6.0, 13.1]"),
        ("prism", RANDOM, "convnet_d3", "0.3 [-2.8, +3.3]"),
        ("prism_plus", "psm", "resnet20", "12.7 [9.1, 16.2]"),
        ("prism_plus", "psm", "convnet_d3", "5.2 [2.4, 8.2]"),
        ("prism_plus", "prism", "resnet20", "20.6 [16.9, 24.3]"),
        ("prism_plus", "prism", "convnet_d3", "8.5 [5.5, 11.6]"),
        ("prism_plus", CONFIDENT, "convnet_d3", "5.5 [3.0, 8.2]"),
        ("prism_plus", RANDOM, "convnet_d3", "9.9 [6.9, 12.8]"),
        (CONFIDENT, "prism_plus", "resnet20", "1.2 [-1.8, +4.1]"),
        ("prism_plus", RANDOM, "resnet20", "1.2 [-2.0, +4.4]"),
        (CONFIDENT, RANDOM, "resnet20", "2.4 [-1.8, +6.0]"),
        (CONFIDENT, RANDOM, "convnet_d3", "4.3 [2.3, 6.3]"),
    ],
)
def test_the_intervals_that_fifty_images_per_class_quote(label, other, student, said):
    quoted("cifar10_ipc50", 50, student, label, other, said)


def test_no_variant_whose_batches_have_all_classes_is_certainly_another_than_prism():
    variants = ("self", "other", "committee", "every_iteration", "all_at_once")
    held = [
        _drawn("cifar10_variants", 10, student).difference(f"prism_{name}", "prism").holds_zero
        for student in ("resnet20", "convnet_d3") for name in variants
    ]  # fmt: skip
    assert held == [True] * 10


@functools.cache
def _of_crops(student):
    """All sets of a student under all protocols, by label and crop in per cent."""
    columns, how = _columns("cifar10_crop")
    sets = {
        (found.label, int(protocol.removeprefix("crop_"))): found.right["test"]
        for (protocol, _, name), of_column in columns.items() if name == student
        for found in of_column
    }  # fmt: skip
    return Drawn(sets, how)


NEAREST = "real images nearest to the anchors"


@pytest.mark.parametrize(
    ("label", "other", "ipc", "student", "said"),
    [
        ("d4m", RANDOM, 1, "resnet18", "4.9 [1.9, 8.2]"),
        (NEAREST, RANDOM, 1, "resnet18", "5.0 [1.4, 9.3]"),
        ("mgd3", NEAREST, 1, "vit", "6.4 [2.3, 10.5]"),
        ("d4m", NEAREST, 1, "vit", "7.5 [0.0, 15.8]"),
        ("d4m", "prism", 10, "vit", "31.6 [24.4, 38.4]"),
    ],
)
def test_the_intervals_that_denoisers_on_the_digits_quote(label, other, ipc, student, said):
    quoted("digits_generated", ipc, student, label, other, said)


def quoted(page: str, ipc: int, student: str, label: str, other: str, said: str) -> None:
    """A difference stands on a page as its records have it."""
    is_quoted(page, _drawn(page, ipc, student).difference(label, other), said)


def is_quoted(page: str, interval: Interval, said: str) -> None:
    assert said in " ".join((RESULTS / f"{page}.md").read_text().split())
    numbers = [float(x) for x in re.findall(r"[-+]?[\d.]+", said)]
    assert numbers == [round(100 * x, 1) for x in interval[:3]]


def test_the_sizes_of_cifar10_s_parts_are_those_of_its_answers():
    page, (columns, _) = (RESULTS / "cifar10.md").read_text(), _columns("cifar10")
    [held_out] = {len(right) for sets in columns.values() for s in sets
                  for right in s.right["held_out"].values()}  # fmt: skip
    [test] = {len(right) for sets in columns.values() for s in sets
              for right in s.right["test"].values()}  # fmt: skip
    train = re.search(r"here without loss; ([\d,]+) for training, (\d+)\nheld out", page)
    assert train and int(train[2]) == held_out and f"{test:,} test images" in page
    assert int(train[1].replace(",", "")) + held_out == 8068


@functools.cache
def _columns(page):
    entries, choices = cells.from_records(workdir.read_record(RESULTS / f"{page}_records.json"))
    return cells.columns(entries), choices.resampling


@functools.cache
def _drawn(page, ipc, student):
    columns, how = _columns(page)
    protocols = {protocol for protocol, *_ in columns}
    protocol = "single" if "single" in protocols else protocols.pop()
    return Drawn({s.label: s.right["test"] for s in columns[protocol, ipc, student]}, how)
