"""What is said of an imported set before anything is made of it, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from prism_jax.data.datasets import DATASETS
from prism_jax.data.exchange import ImageSet
from prism_jax.data.sets import fkd, torch_file
from prism_jax.data.sources import ArraySource
from prism_jax.errors import UserError
from prism_jax.stages import imported

CLASSES, IPC = 10, 8
LABELS = np.repeat(np.arange(CLASSES), IPC)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run on an imported set whose teacher has these logits; what it says is kept."""

    def make(logits, *, loss="kl", labels_from=None, **arrays):
        np.savez(
            tmp_path / "set.npz", images=np.zeros((len(LABELS), 8, 8, 1), np.uint8), labels=LABELS,
            **arrays,
        )  # fmt: skip
        real = ArraySource(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10), num_classes=10)
        source = ImageSet(tmp_path / "set.npz", DATASETS["digits"], real, ipc=IPC, image_size=8)
        (tmp_path / "recover").mkdir(exist_ok=True)
        monkeypatch.setattr(imported, "logits_of", lambda *_: logits)
        said: list[str] = []
        config = SimpleNamespace(
            relabel=SimpleNamespace(teachers=("first",), labels_from=labels_from, batch_size=40),
            recover=SimpleNamespace(initialise_from="set.npz", ipc=IPC),
            validate=SimpleNamespace(loss=loss),
            dataset=SimpleNamespace(num_classes=CLASSES, image_size=8),
        )
        context = SimpleNamespace(
            root=tmp_path, config=config, say=said.append, said=said,
            once=lambda name, make: make(), work=SimpleNamespace(acquire=lambda: None),
            inputs=SimpleNamespace(start=source, info=DATASETS["digits"]),
        )  # fmt: skip
        labelled = SimpleNamespace(labels_N=source.labels_N, images_uint8_NHWC=None)
        return context, labelled

    return make


def say_top1(context, labelled, made_of="settings"):
    imported.say_top1(context, labelled, lambda names: {name: made_of for name in names})


def certain(classes):
    return 9.0 * np.eye(CLASSES, dtype=np.float32)[classes]


def test_the_teachers_top1_is_said_once(run, tmp_path):
    seen = LABELS.copy()
    seen[::8] = (seen[::8] + 1) % CLASSES  # one of eight is wrong
    context, labelled = run(certain(seen))
    say_top1(context, labelled)
    (said,) = context.said
    assert "first finds 87.5% of the imported images to be of their class (chance is 10.0%)" in said
    assert json.loads((tmp_path / "recover" / "imported.json").read_text())["top1"] == {
        "first": 0.875
    }
    say_top1(context, labelled)
    assert len(context.said) == 1


def test_it_is_said_again_of_other_teachers_and_of_another_set(run, tmp_path):
    record = tmp_path / "recover" / "imported.json"

    def said(made_of="settings", teachers=("first",), **arrays):
        context, labelled = run(certain(LABELS), **arrays)
        context.config.relabel.teachers = teachers
        say_top1(context, labelled, made_of)
        return len(context.said)

    assert [said(), said()] == [1, 0]
    assert [said("others"), said("others")] == [1, 0]  # a teacher of the same name
    assert [said(teachers=("first", "second")), said(teachers=("first", "second"))] == [2, 0]
    assert [said(weights=np.arange(80.0)), said(weights=np.arange(80.0))] == [1, 0]
    # What an older version wrote does not say of what: a finished run is left as it is.
    record.write_text(json.dumps({"format": "npz", "top1": {"first": 0.875}}))
    assert said() == 0 and said(teachers=("second",)) == 1


def test_permuted_labels_are_seen_at_once(run):
    order = np.array([3, 7, 1, 0, 9, 2, 8, 4, 6, 5])
    context, labelled = run(certain(order[LABELS]))
    say_top1(context, labelled)
    first, warning = context.said
    assert "first finds 0.0%" in first
    for part in ("in another order it would be 100.0%", "0 look like 3", "initialise_classes"):
        assert part in warning


def test_a_teacher_that_knows_none_of_them_is_warned_of(run):
    random = np.random.default_rng(0).normal(size=(len(LABELS), CLASSES)).astype(np.float32)
    context, labelled = run(random)
    say_top1(context, labelled)
    assert "Likely causes, in order: classes in another order" in context.said[1]


def test_what_a_set_lacks_or_a_loss_cannot_is_refused(run):
    imported.check(run(None)[0])
    imported.check(run(None, weights=np.arange(80.0))[0])
    with pytest.raises(UserError, match="have weights, and validate.loss='dist'"):
        imported.check(run(None, loss="dist", weights=np.arange(80.0))[0])
    with pytest.raises(UserError, match="'set', and set.npz has no soft labels"):
        imported.check(run(None, labels_from="set")[0])
    imported.check(run(None, labels_from="set", soft_labels=certain(LABELS))[0])
    others = certain((LABELS + 1) % CLASSES)
    imported.check(run(None, soft_labels=others)[0])  # nobody reads them
    with pytest.raises(UserError, match="soft labels contradict its labels"):
        imported.check(run(None, labels_from="set", soft_labels=others)[0])


def test_soft_labels_of_which_two_columns_changed_places_are_warned_of(run):
    order = np.arange(CLASSES)
    order[[2, 5, 7]] = 5, 7, 2
    context, _ = run(None, labels_from="set", soft_labels=certain(order[LABELS]))
    imported.check(context)
    (said,) = context.said
    assert "for 70.0%; with the columns in another order for 100.0%: images of class 2 look" in said
    context, _ = run(None, labels_from="set", soft_labels=certain(LABELS))
    imported.check(context)
    assert not context.said


def test_labels_of_other_batches_are_refused_before_any_work(run, tmp_path):
    order = fkd.torch_orders(len(LABELS), 1)[0]
    for size in (40, 20):
        root = tmp_path / str(size) / "epoch_0"
        root.mkdir(parents=True)
        for batch, at in enumerate(range(0, len(LABELS), size)):
            rows = order[at : at + size]
            whole = np.tile(np.float32([0, 0, 1, 1]), (size, 1))
            label = [whole, np.zeros(size, bool), None, None, None, certain(LABELS[rows])]
            torch_file.save(root / f"batch_{batch}.tar", label)
    context, _ = run(None, labels_from=str(tmp_path / "40"))
    imported.check_labels(context)
    assert "agree with the classes of their images for 100%" in context.said[0]
    with pytest.raises(UserError, match=r"batches of 20 images.* validate.batch_size \(now 40\)"):
        imported.check_labels(run(None, labels_from=str(tmp_path / "20"))[0])
