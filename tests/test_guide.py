"""The commands of docs/guide.md run, in its order; page and test cannot part.

The commands are those of the page's bash blocks. The fast tests read each with the config that it
names, and run those that only read a finished run on the suite's tiny one. The slow one runs all
of them in a folder with 24 pictures, with smaller numbers and networks behind each (``SMALLER``).
"""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.command import ROOT, TINY, call, reference
from helpers.images import encoded

from prism_jax import compare, main
from prism_jax.config import resolve
from prism_jax.tools import export, results

__all__ = ["reference"]  # a fixture

PAGE = (ROOT / "docs" / "guide.md").read_text()
MODULES = {
    "prism_jax.main": main.main,
    "prism_jax.compare": compare.main,
    "prism_jax.tools.results": results.main,
    "prism_jax.tools.export": export.main,
}
NETWORKS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5", "convnet")
# Of an experiment: networks of one layer, two iterations, two epochs, four images.
SMALLER = (
    *(f"networks.{n}.{f}" for n in NETWORKS for f in
      ("architecture=convnet_d1_bn", "width=0.0625", "depth=1.0", "stem=imagenet")),
    "squeeze.epochs=1", "squeeze.least_steps=0", "squeeze.least_top1=0.0", "recover.iterations=2",
    "recover.ipc=2",
    "relabel.epochs=2", "relabel.batch_size=4", "validate.epochs=2", "validate.batch_size=4",
    "validate.accumulate=1", "dataset.image_size=8", "dataset.num_classes=2",
)  # fmt: skip


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.S | re.M)


def commands() -> list[list[str]]:
    """The words of every command of the page; ``make demo`` is what the Makefile has for it."""
    found = []
    for line in "".join(blocks("bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        found += demo() if words == ["make", "demo"] else [words]
    return [words for words in found if words]


def demo() -> list[list[str]]:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^demo: .*\n((?:\t.*\n)+)", makefile, re.M)
    values = {"$(MAIN)": "python -m prism_jax.main", "$(TEACHERS)": "runs/digits_ipc10"}
    for name, value in values.items():
        assert name in recipe
        recipe = recipe.replace(name, value)
    return [shlex.split(line) for line in recipe.splitlines()]


def run(words: list[str], *more: str) -> str:
    """Run a command of the page in this process, in the folder it stands in; what it printed."""
    python, module, name, *arguments = words
    assert (python, module) == ("python", "-m"), words
    status, out, err = call(*arguments, *more, main=MODULES[name])
    assert status == 0, f"{shlex.join(words)}\n{out}\n{err}"
    return out


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[pathlib.Path]:
    """Where a reader stands: the configs, and pictures of two classes."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for split, count in (("train", 10), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                path = tmp_path / "my_pets" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(np.full((8, 8, 3), 100 * label + 9 * i, np.uint8)))
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def smaller(words: list[str]) -> list[str]:
    """The flags that make a command of the page a matter of seconds."""
    if "prism_jax.compare" in words:
        quoted = ",".join(repr(field) for field in SMALLER if "recover.ipc" not in field)
        return [f"--config.shared=({quoted})", "--config.seeds=(0,)"]
    if "prism_jax.main" not in words:
        return []
    fields = list(SMALLER)
    if any("rded" in word for word in words):  # which optimises nothing
        fields.remove("recover.iterations=2")
        fields.append("recover.patch_images=4")
    return [f"--config.{field}" for field in fields]


def test_the_page_has_six_steps_with_commands():
    steps = re.split(r"^## ", PAGE, flags=re.M)[1:]
    assert [step[:2] for step in steps] == [f"{i}." for i in range(1, 7)]
    assert all("```bash" in step for step in steps)
    assert {words[2] for words in commands()} == set(MODULES)


@pytest.mark.parametrize("small", [False, True])
def test_every_experiment_of_the_page_can_be_used(folder, small):
    for words in commands():
        problems: list[str] = []
        _, _, module, *arguments = [*words, *(smaller(words) if small else ())]
        if module == "prism_jax.main":
            resolve(main.parse(arguments, problems)[0], problems)
        elif module == "prism_jax.compare":
            config = main.parse(arguments, problems)[0]
            cells = [c for c in compare.cells(config) if c.seed == 0]
            assert {c.row for c in cells} == {"prism", "sre2l", "random_real"}
            names = {compare.experiment_of(config, cell).dataset.name for cell in cells}
            assert names == {"my_pets"}
        assert not problems


def test_what_only_reads_a_run_reads_the_finished_one(folder, reference):
    """Steps 2 and 6, on the tiny run in the demo's place; what the page lists is there."""
    shutil.copytree(reference, folder / "runs" / "digits_ipc10")
    again, demos = commands()[2], demo()[0]
    assert again == demos  # the demo's own
    said = run([*again[:3], TINY, "--workdir=runs/digits_ipc10"])
    rows = [line.split("  ")[0] for line in blocks("text")[0].splitlines()]
    shown = {"synthetic", "random real, soft labels", "full real training set", "images"}
    shown |= {"recover", "distance from initial", "soft labels", "intra-class cosine"}
    assert shown <= set(rows) and all(row in said for row in shown)
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE, re.M)
    assert len(listed) == 6
    assert all((folder / "runs" / "digits_ipc10" / name).exists() for name in listed)

    (table,) = (words for words in commands() if "prism_jax.tools.results" in words)
    said = run([word for word in table if word != "runs/digits_sre2l_ipc10"])
    assert "| IPC | trained on |" in said and "| **prism** |" in said
    (out,) = (words for words in commands() if "prism_jax.tools.export" in words)
    assert run(out).startswith(
        "prism_digits_ipc10: 8 images of 4 classes; soft labels: class folders"
    )
    card = (folder / "prism_digits_ipc10" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "random real, soft labels" in card


@pytest.mark.slow
def test_every_command_of_the_page_runs_in_its_order(folder):
    said = [run(words, *smaller(words)) for words in commands()]
    runs = folder / "runs"
    for name in ("digits_ipc10", "digits_sre2l_ipc10", "digits_short", "my_pets_longer"):
        assert (runs / name / "report.html").exists()
    by_rded = [text for text in said if "preset rded" in text]
    assert len(by_rded) == 1 and "adopted squeeze/resnet18 from runs/digits_ipc10" in by_rded[0]
    for name in ("table.md", "table.tex", "table.csv", "accuracy_over_cost.png"):
        assert (runs / "compare_own_cpu" / name).exists()
    assert "| sre2l |" in (runs / "compare_own_cpu" / "table.md").read_text()
