"""Working directories of version 0.1 go on: what is finished in them is only read."""

from __future__ import annotations

import pathlib
import shutil
import tarfile

import pytest
from helpers.command import TINY, call, results, snapshot
from old.make_workdir import ARCHIVE, known, make


@pytest.fixture
def old(tmp_path: pathlib.Path) -> pathlib.Path:
    """A finished working directory of version 0.1."""
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE.name} is not here; python tests/old/make_workdir.py makes it")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_a_finished_run_is_only_read(old):
    before = snapshot(old)
    status, out, err = call(TINY, f"--workdir={old}")
    assert status == 0, f"{err}\nA new field? stages/fingerprints.LATER says what it was before"
    assert "top-1 on real test images" in out
    assert snapshot(old) == before


def test_what_is_missing_is_made_and_the_rest_is_kept(old):
    kept = ("squeeze", "recover", "controls", "relabel")
    shutil.rmtree(old / "validate")
    before = snapshot(old, *kept)
    status, _, err = call(TINY, f"--workdir={old}")
    assert status == 0, err
    assert snapshot(old, *kept) == before
    assert (old / "validate" / "outside" / "0" / "record.json").exists()


def test_other_settings_are_seen(old):
    before = snapshot(old)
    status, _, err = call(TINY, f"--workdir={old}", "--config.recover.alpha_bn=0.5")
    assert status == 2 and "recover.alpha_bn: 0.01 -> 0.5" in err
    assert snapshot(old) == before


@pytest.mark.slow
@pytest.mark.skipif(not known(), reason="the history lacks the last commit of version 0.1")
def test_a_run_that_it_began_ends_with_its_bits(tmp_path):
    root = make(tmp_path)
    whole = results(root)
    unit = sorted((root / "recover" / "units").iterdir())[0]
    for path in (unit, root / "recover" / "manifest.json"):
        path.unlink()
    shutil.rmtree(root / "validate")
    status, _, err = call(TINY, f"--workdir={root}")
    assert status == 0, err
    found = results(root)
    assert [name for name in whole if found.get(name) != whole[name]] == []
