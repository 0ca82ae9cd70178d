"""A part of the training images that nothing is made of, and that students are tested on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from helpers.command import TINY, call

from configs import tiny
from prism_jax.config import resolve
from prism_jax.data import answers
from prism_jax.data.sets import floats
from prism_jax.data.sets.base import Stated
from prism_jax.data.sources import read_all
from prism_jax.errors import UserError
from prism_jax.stages import analyse, fingerprints
from prism_jax.stages.context import Context
from prism_jax.stages.controls import labelled_set
from prism_jax.stages.inputs import HELD_OUT


def context(tmp_path, **dataset) -> Context:
    experiment = resolve(tiny.get_config())
    changed = dataclasses.replace(experiment.dataset, **dataset)
    return Context(dataclasses.replace(experiment, dataset=changed), tmp_path / "run")


def images(run: Context, split: str) -> set[bytes]:
    source = run.inputs.open(split)
    return {source.image(i).tobytes() + bytes([source.labels_N[i]]) for i in range(len(source))}


def test_parts_are_disjoint_stratified_and_whole(tmp_path):
    whole, run = context(tmp_path), context(tmp_path, held_out=0.25)
    left, out = images(run, "train"), images(run, HELD_OUT)
    assert not left & out and left | out == images(whole, "train")
    counts = [
        np.bincount(found.labels_N)
        for found in (run.inputs.open(HELD_OUT), whole.inputs.open("train"))
    ]
    np.testing.assert_array_equal(counts[0], np.round(0.25 * counts[1]))
    assert images(run, "test") == images(whole, "test")
    # By the seed: the same again, another one with another.
    again, other = (context(tmp_path, held_out=0.25, held_out_seed=seed) for seed in (0, 1))
    assert images(again, HELD_OUT) == out != images(other, HELD_OUT)


def test_a_whitening_is_undone_by_all_training_images(tmp_path):
    """Whoever whitened the set held none of them out."""
    experiment = resolve(tiny.get_config())
    random, classes = np.random.default_rng(0), experiment.dataset.num_classes
    size, ipc = experiment.dataset.image_size, experiment.recover.ipc
    whitened = random.normal(0, 0.1, (classes * ipc, size, size, 1)).astype(np.float32)
    np.savez(tmp_path / "set.npz", images=whitened, labels=np.repeat(np.arange(classes), ipc))
    recover = dataclasses.replace(
        experiment.recover,
        initialise="folder",
        initialise_from=str(tmp_path / "set.npz"),
        initialise_whitening="zca",
    )
    whole, run = context(tmp_path), context(tmp_path, held_out=0.25)
    run.inputs.config = dataclasses.replace(run.config, recover=recover)
    by_all, by_what_is_left = (
        floats.to_pixels("x", whitened, Stated(whitening="zca"), of.inputs.open("train"))
        for of in (whole, run)
    )
    found, _ = read_all(run.inputs.start)
    np.testing.assert_array_equal(found, by_all)
    assert (found != by_what_is_left).any()


def test_it_enters_what_everything_is_made_of_and_nothing_without_it(tmp_path):
    whole, run, other = (
        context(tmp_path, **fields)
        for fields in ({}, {"held_out": 0.25}, {"held_out": 0.25, "held_out_seed": 3})
    )
    made = {
        "teacher": lambda c: fingerprints.teacher(c, "first"),
        "recover": fingerprints.recover,
        "student": lambda c: fingerprints.validate(c, labelled_set(c, "full_real"), "outside", 0),
        "generator": fingerprints.generator,
    }
    for name, of in made.items():
        digests = {json.dumps(of(c), sort_keys=True) for c in (whole, run, other)}
        assert len(digests) == 3, name
        assert "held_out" not in json.dumps(of(whole)), name


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_of_nothing_or_of_all_is_refused(tmp_path, share):
    with pytest.raises(UserError, match="at least one must be held out, and one left"):
        context(tmp_path, held_out=share).inputs.open("train")
    config = tiny.get_config()
    config.dataset.held_out = 1.5
    with pytest.raises(UserError, match="dataset.held_out is 1.5"):
        resolve(config)


def test_students_are_tested_on_it_and_keep_their_answers(tmp_path):
    status, out, err = call(
        TINY, f"--workdir={tmp_path}", "--config.dataset.held_out=0.2",
        "--config.validate.controls=random_real_hard",
    )  # fmt: skip
    assert status == 0, err
    run = context(tmp_path, held_out=0.2)
    for where in ("validate", "controls/random_real_hard/validate"):
        folder = tmp_path / where / "outside" / "0"
        record = json.loads((folder / "record.json").read_text())
        said = answers.read(folder)
        assert list(said) == ["test", HELD_OUT]
        for part, top1 in (("test", record["top1"]), (HELD_OUT, record["held_out"])):
            truth_N = run.inputs.open(part).labels_N
            assert (said[part] == truth_N).mean() == top1
    summary = json.loads((tmp_path / "summary.json").read_text())
    synthetic = json.loads((tmp_path / "validate/outside/0/record.json").read_text())
    assert summary["validate"]["outside"]["held_out"] == synthetic["held_out"]
    assert summary["dataset"]["train_images"] == len(run.inputs.open("train"))
    assert "0.2 of the training images" in " ".join(analyse.notes(run))
    [line] = [line for line in out.splitlines() if line.startswith("on held-out images")]
    assert line.rstrip().endswith(f"outside {100 * synthetic['held_out']:.1f}")
    assert "may have seen" not in " ".join(analyse.notes(run))
