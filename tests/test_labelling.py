"""Soft labels: the same for any number of devices, and of the views that the student sees."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import fast_programs
from helpers.networks import GREY, Mirror, small_pool

import prism_jax
from prism_jax import parallel, rng
from prism_jax.core import batching
from prism_jax.core.augment import Augment, augment
from prism_jax.data import label_store
from prism_jax.data.label_store import LabelPlan
from prism_jax.errors import UserError
from prism_jax.labelling import (
    ORDER,
    VIEWS,
    FixedLabels,
    Labeller,
    LabelRecipe,
    OnlineLabels,
    drawn,
    shown,
)
from prism_jax.models import layers
from prism_jax.teachers import TeacherPool, batch_statistics
from prism_jax.training import Trainer, TrainRecipe, importance, soft_batches
from prism_jax.types import Mix

__all__ = ["fast_programs"]  # a fixture

COUNT, BATCH, SIZE = 23, 5, 16  # five batches, the last of three images
HOW = Augment(crop_min=0.25, flip=True, mix="cutmix")


@functools.cache
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 1), np.uint8)


@functools.cache
def pool() -> TeacherPool:
    return small_pool(2, image_shape=(SIZE, SIZE, 1))


RECIPE = LabelRecipe(HOW, "norm_mean", BATCH)


@functools.cache
def labels(devices: int, how: str = "shard_map", epoch: int = 2, threads: int = 1):
    used = jax.devices()[:devices] * threads
    labeller = Labeller(pool(), RECIPE, devices=used, how=how)
    return list(labeller.epoch(images(), epoch, seed=3))


def test_a_program_of_many_sets_keeps_no_sets_teachers():
    """Not on the devices and not on the host, where the next set has its own."""

    def label() -> weakref.ref:
        teachers = dataclasses.replace(pool())
        next(Labeller(teachers, RECIPE).epoch(images(), 0, seed=0))
        return weakref.ref(teachers)

    with parallel.shared_programs():
        first = label()
        gc.collect()
        assert first() is None


@pytest.mark.parametrize(
    ("devices", "how", "threads"),
    [(2, "shard_map", 1), (8, "shard_map", 1), (8, "pmap", 1), (1, "shard_map", 2)],
)
def test_any_number_of_devices_or_threads_gives_the_same_labels(devices, how, threads):
    one, many = labels(1), labels(devices, how, threads=threads)
    assert len(one) == len(many) == 5
    for a, b in zip(one, many, strict=True):
        assert (a.epoch, a.batch) == (b.epoch, b.batch)
        np.testing.assert_array_equal(a.index_B, b.index_B)
        assert a.logits_BK.dtype == b.logits_BK.dtype == np.float32
        np.testing.assert_array_equal(a.logits_BK, b.logits_BK)


def test_every_image_is_labelled_once_an_epoch_in_another_order():
    records = labels(8)
    assert [len(r.index_B) for r in records] == [5, 5, 5, 5, 3]
    assert [r.logits_BK.shape for r in records] == [(5, 5)] * 4 + [(3, 5)]
    assert [r.batch for r in records] == list(range(5))
    order = np.concatenate([r.index_B for r in records])
    np.testing.assert_array_equal(np.sort(order), np.arange(COUNT))
    np.testing.assert_array_equal(order, rng.generator(3, ORDER, 2).permutation(COUNT))
    other = np.concatenate([r.index_B for r in labels(8, epoch=1)])
    assert not np.array_equal(order, other)


@jax.jit
def plainly(key, pixels):
    """The ensemble written out: one batch, no map, no Labeller."""
    seen, _ = augment(key, pixels, HOW, GREY)
    a, b = (t.module.apply(v, seen) for t, v in zip(pool().teachers, pool().variables, strict=True))
    size_a, size_b = jnp.linalg.norm(a), jnp.linalg.norm(b)
    size = (size_a + size_b) / 2
    return (a * size / size_a + b * size / size_b) / 2


def test_a_record_holds_the_ensembles_logits_of_its_own_view():
    """One batch, written out: a lane that got another batch's coordinates would show."""

    def off(record, *coordinates) -> float:
        key = rng.stream(rng.root(3), VIEWS, *coordinates)
        return float(jnp.abs(plainly(key, images()[record.index_B]) - record.logits_BK).max())

    for record in labels(8):
        assert off(record, record.epoch, record.batch) < 1e-4
        assert off(record, record.epoch, record.batch + 1) > 0.05
        assert off(record, record.epoch + 1, record.batch) > 0.05


# --- teachers in train mode -----------------------------------------------------------------------


def alone() -> TeacherPool:
    return pool().select(pool().names[:1])


@functools.cache
def first_batch() -> np.ndarray:
    """As the teachers see it."""
    index = rng.generator(3, ORDER, 2).permutation(COUNT)[:BATCH]
    key = rng.stream(rng.root(3), VIEWS, 2, 0)
    show = jax.jit(lambda key, pixels: augment(key, pixels, HOW, GREY)[0])
    return np.asarray(show(key, images()[index]))


@jax.jit
def in_training_mode(variables, images_BHWC):
    module = pool().teachers[0].module
    return module.apply(variables, images_BHWC, train=True, mutable=["batch_stats"])[0]


def by_groups(sizes: list[int]) -> np.ndarray:
    """The first batch with every group as a forward pass of its own, in flax's training mode."""
    parts = np.split(first_batch(), np.cumsum(sizes)[:-1])
    return np.concatenate([in_training_mode(pool().variables[0], part) for part in parts])


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize(("group", "sizes"), [(None, [5]), (3, [3, 2]), (2, [3, 2]), (9, [5])])
def test_teachers_in_train_mode_use_the_statistics_of_their_group(group, sizes):
    """Where groups of two would leave an image alone, it joins another group."""
    recipe = LabelRecipe(HOW, "mean", BATCH, teacher_mode="train", bn_group=group)
    found = next(Labeller(alone(), recipe).epoch(images(), 2, seed=3)).logits_BK
    np.testing.assert_allclose(found, by_groups(sizes), rtol=1e-4, atol=1e-4)
    for others in ([5], [3, 2], [2, 2, 1]):  # twins: other groups; the running statistics
        assert others == sizes or np.abs(found - by_groups(others)).max() > 0.05
    still = dataclasses.replace(recipe, teacher_mode="eval", bn_group=None)
    evaluated = next(Labeller(alone(), still).epoch(images(), 2, seed=3)).logits_BK
    assert np.abs(found - evaluated).max() > 0.05


@pytest.mark.usefixtures("fast_programs")
def test_a_short_batch_divides_as_the_students_does():
    """Five images in two parts of groups of at most five: three and two, not five."""
    recipe = LabelRecipe(HOW, "mean", BATCH, teacher_mode="train", bn_group=5, parts=2)
    found = next(Labeller(alone(), recipe).epoch(images(), 2, seed=3)).logits_BK
    groups = [g for p in batching.passes(5, accumulate=2, bn_group=5) for g in p.groups]
    assert groups == [3, 2]
    np.testing.assert_allclose(found, by_groups(groups), rtol=1e-4, atol=1e-4)
    assert np.abs(found - by_groups([5])).max() > 0.05


def test_dropout_stays_off_and_running_statistics_stay():
    class Drops(nn.Module):
        @nn.compact
        def __call__(self, x_BHWC, train: bool = False):
            x_BHWC = layers.BatchNorm(name="bn")(x_BHWC, train=train)
            return layers.Dropout(0.5, name="drop")(layers.flatten(x_BHWC), train)

    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, (6, 2, 2, 3)), jnp.float32)
    variables = Drops().init(jax.random.key(0), x)
    with batch_statistics(6):
        found, told = Drops().apply(variables, x, mutable=["bn_statistics"])
    normal = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(found, layers.flatten(normal), rtol=1e-4, atol=1e-5)
    assert "batch_stats" not in told
    outside = Drops().apply(variables, x)
    np.testing.assert_allclose(outside, layers.flatten(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fast_programs")
def test_the_committees_votes_reach_the_logits():
    def combined(ensemble: str, *priors: float) -> np.ndarray:
        recipe = LabelRecipe(HOW, ensemble, BATCH, priors=priors or None)
        return next(Labeller(pool(), recipe).epoch(images(), 2, seed=3)).logits_BK

    one, other = (combined("committee", *p) for p in ((900.0, 0.0), (0.0, 900.0)))
    np.testing.assert_allclose(combined("mean"), (one + other) / 2, rtol=1e-5, atol=1e-6)
    share = 1 / (1 + np.exp(-0.7))
    expected = share * one + (1 - share) * other
    np.testing.assert_allclose(combined("committee", 57, 50), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(combined("mean") - expected).max() > 0.05


# --- a store, or none -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "coding", [("float32", None), ("float16", None), ("int8", None), ("int8", 2)], ids=str
)
def test_labels_made_online_are_those_of_the_store(tmp_path, coding):
    plan = LabelPlan(COUNT, 5, BATCH, 3, *coding, epochs_per_shard=3)
    labeller = Labeller(pool(), RECIPE)
    made = [r for epoch in range(3) for r in labeller.epoch(images(), epoch, seed=3)]
    label_store.write_shard(tmp_path, plan, 0, made)
    label_store.write_manifest(tmp_path, plan, images="", teachers={}, view={})
    stored = label_store.LabelReader(tmp_path)
    online = OnlineLabels(Labeller(pool(), RECIPE, devices=jax.devices()[:2]), images(), plan, 3)
    for start in (0, 4, 11, 17):  # also in the middle of an epoch, and of a second time
        ours, theirs = (list(x.read(start=start, epochs=5)) for x in (online, stored))
        assert len(ours) == 25 - start
        for a, b in zip(ours, theirs, strict=True):
            assert (a.epoch, a.batch) == (b.epoch, b.batch)
            np.testing.assert_array_equal(a.index_B, b.index_B)
            np.testing.assert_array_equal(a.logits_BK, b.logits_BK)
    # The twin leaves the precision step out.
    exact = np.concatenate([r.logits_BK for r in made])
    kept = np.concatenate([r.logits_BK for r in stored.read()])
    assert np.array_equal(exact, kept) == (coding == ("float32", None))


# --- replay: what the student sees is what the teacher saw ----------------------------------------


def mirror_pool() -> TeacherPool:
    """A teacher whose logits are the pixels it was shown."""
    module = Mirror()
    one, zero = np.ones(SIZE * SIZE, np.float32), np.zeros(SIZE * SIZE, np.float32)
    bias = {"params": {"scale": one, "bias": zero}, "batch_stats": {}}
    return TeacherPool.of(
        {"mirror": (module, bias)}, image_shape=(SIZE, SIZE, 1), normalisation=GREY
    )


def mirror_records(how: Augment = HOW, epochs: int = 2) -> list:
    labeller = Labeller(mirror_pool(), LabelRecipe(how, "single", BATCH))
    return [r for epoch in range(epochs) for r in labeller.epoch(images(), epoch, seed=3)]


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize(
    ("mix", "per"),
    [("none", "batch"), ("cutmix", "batch"), ("mixup", "batch"), ("cutmix", "image"),
     ("mixup", "image")],
)  # fmt: skip
def test_the_student_sees_what_the_teacher_saw(mix, per):
    how = dataclasses.replace(HOW, mix=mix, mix_per=per)
    records = mirror_records(how)[5:]

    def losses(view_seed=3, records=records, how=how):
        """The mean squared difference between a mirror student and the labels, per batch."""
        recipe = TrainRecipe(VIEWS, how, loss="mse_gt", epochs=2)
        trainer = Trainer(Mirror(), recipe, GREY, view_seed=view_seed, seed=0)
        zeros = np.zeros(COUNT, np.int32)
        batches = soft_batches(images(), zeros, records[1:], per_epoch=5)  # whole ones, a ragged
        state = jax.device_get(trainer.start((SIZE, SIZE, 1)))
        return [float(trainer.step(state, batch)[1]) for batch in batches]

    assert max(losses()) < 1e-9
    # Twins: another way to mix; another seed, the coordinates of another batch, another bound.
    if per == "image":
        assert max(losses(how=dataclasses.replace(how, mix_per="batch"))) > 1e-2
        return
    assert min(losses(view_seed=4)) > 1e-2
    assert min(losses(records=[r._replace(batch=r.batch + 1) for r in records])) > 1e-2
    if mix == "none":
        assert max(losses(how=dataclasses.replace(how, crop_min=0.5))) > 1e-2


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize("per", ["batch", "image"])
def test_what_a_record_shows_is_replayed_from_the_manifest(per):
    how = dataclasses.replace(HOW, mix_per=per)
    record = mirror_records(how)[-1]
    view = {**dataclasses.asdict(how), "ensemble": "single", "seed": 3}
    seen = shown(record, images(), view, GREY).reshape(len(record.index_B), -1)
    np.testing.assert_allclose(seen, record.logits_BK, atol=1e-6)
    for other in ({"seed": 4}, {"mix": "none"}):
        twin = shown(record, images(), {**view, **other}, GREY).reshape(seen.shape)
        assert np.abs(twin - seen).max() > 0.1


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize("mix", ["none", "cutmix", "mixup"])
def test_labels_from_elsewhere_bring_their_views(mix):
    """Whatever the student's own seed, crops and mix: it is shown what the record says."""
    how = dataclasses.replace(HOW, mix=mix)
    view = {**dataclasses.asdict(how), "ensemble": "single", "seed": 3}

    def bringing(record, of):
        crops, mixed = drawn(of, (SIZE, SIZE), view)
        rows = len(of.index_B)  # per image, as somebody else's come
        box, weight, blend = (np.broadcast_to(x, (rows, *x.shape)) for x in mixed[1:])
        return record._replace(shown=(crops, Mix(mixed.partner_B, box, weight, blend)))

    records = mirror_records(how)[5:]
    recipe = TrainRecipe(VIEWS, dataclasses.replace(HOW, crop_min=1.0), loss="mse_gt", epochs=2)
    trainer = Trainer(Mirror(), recipe, GREY, view_seed=77, seed=0)
    state = jax.device_get(trainer.start((SIZE, SIZE, 1)))

    def losses(records):
        zeros = np.zeros(COUNT, np.int32)
        batches = soft_batches(images(), zeros, records, per_epoch=5)
        return [float(trainer.step(state, batch)[1]) for batch in batches]

    assert max(losses([bringing(r, of=r) for r in records])) < 1e-9
    twins = [bringing(r, of=r._replace(batch=r.batch + 5)) for r in records]
    assert min(losses(twins)) > 1e-2


def test_one_label_per_image_follows_its_image():
    logits = np.random.default_rng(5).normal(size=(COUNT, 3)).astype(np.float32)
    plan = LabelPlan(COUNT, 3, BATCH, epochs=2, precision="float32")
    found = list(FixedLabels(logits, plan, seed=3).read(epochs=5))
    assert [(r.epoch, r.batch) for r in found] == [(e % 2, b) for e in range(5) for b in range(5)]
    for record, same in zip(found, [*mirror_records()] * 2, strict=False):
        np.testing.assert_array_equal(record.index_B, same.index_B)  # in the order of ours
        np.testing.assert_array_equal(record.logits_BK, logits[same.index_B])
    rest = FixedLabels(logits, plan, seed=3).read(start=7, epochs=5)
    for record, same in zip(rest, found[7:], strict=True):
        np.testing.assert_array_equal(record.logits_BK, same.logits_BK)


def test_weights_follow_their_images_and_mixed_ones_share_theirs():
    weights = np.arange(COUNT, dtype=np.float32)
    records = mirror_records()[:2]
    batches = soft_batches(
        images(), np.zeros(COUNT, np.int32), records, per_epoch=5, weights_N=weights
    )
    for record, batch in zip(records, batches, strict=True):
        assert batch.weights_B.tolist() == record.index_B.tolist()
    mix = Mix(np.array([1, 2, 0]), np.zeros(4), np.float32(0.75), np.float32(1))
    found = importance(np.array([4.0, 0.0, 8.0]), mix)
    assert found.tolist() == [3.0, 2.0, 7.0]  # 3/4 of its own, 1/4 of its partner's
    assert importance(None, mix) is None


@pytest.mark.usefixtures("fast_programs")
def test_labels_that_come_again_show_the_same_views_at_later_rates():
    records = mirror_records(epochs=2)
    recipe = TrainRecipe(VIEWS, HOW, loss="mse_gt", epochs=5)
    trainer = Trainer(Mirror(), recipe, GREY, view_seed=3, seed=0)
    state = jax.device_get(trainer.start((SIZE, SIZE, 1)))
    stored = records + records + records[:5]
    batches = list(soft_batches(images(), np.zeros(COUNT, np.int32), stored, per_epoch=5))
    assert [b.epoch for b in batches] == [e for e in range(5) for _ in range(5)]
    assert [b.view_epoch for b in batches] == [e for e in (0, 1, 0, 1, 0) for _ in range(5)]
    later = list(soft_batches(images(), np.zeros(COUNT), stored[7:], per_epoch=5, start=7))
    assert [(b.epoch, b.view_epoch) for b in later] == [
        (b.epoch, b.view_epoch) for b in batches[7:]
    ]

    def loss(batch) -> float:
        return float(trainer.step(state, batch)[1])

    assert max(map(loss, batches[10:])) < 1e-9
    # Twin: the views of the training's own epoch.
    assert min(loss(b._replace(view_epoch=None)) for b in batches[10:]) > 1e-2
    # The learning rate is that of the training's epoch, not of the stored one.
    wrong = np.ones((BATCH, SIZE * SIZE), np.float32)
    early, late = (batches[i]._replace(logits_BK=wrong) for i in (0, 20))
    moved = [trainer.step(state, b)[0].params["bias"] - state.params["bias"] for b in (early, late)]
    assert np.abs(moved[1]).max() < 0.5 * np.abs(moved[0]).max()


def test_soft_labels_of_other_images_and_unknown_ensembles_are_refused():
    records = prism_jax.relabel(mirror_pool(), images()[:-1], epochs=1, batch_size=BATCH)
    with pytest.raises(UserError, match=f"fit got {COUNT} images and soft labels of {COUNT - 1}"):
        prism_jax.fit(
            Mirror(), images(), np.zeros(COUNT), normalisation=GREY, soft_labels=records
        )  # fmt: skip
    with pytest.raises(UserError, match=r"ensemble is 'meen' \(did you mean 'mean'\?\)"):
        prism_jax.relabel(mirror_pool(), images(), ensemble="meen")
    with pytest.raises(UserError, match=r"a keyword of relabel is 'ordr' \(did you mean 'order'"):
        prism_jax.relabel(mirror_pool(), images(), ordr="torch")
    with pytest.raises(UserError, match="a keyword of fit is 'learning_rat'"):
        prism_jax.fit(Mirror(), images(), np.zeros(COUNT), normalisation=GREY, learning_rat=1.0)


@pytest.mark.usefixtures("fast_programs")
def test_relabel_and_fit_agree_by_default_and_from_the_same_seed():
    records = prism_jax.relabel(mirror_pool(), images(), epochs=2, batch_size=BATCH, seed=5)
    assert [(r.epoch, r.batch) for r in records] == [(e, b) for e in range(2) for b in range(5)]

    def drift(**options) -> float:
        """How far differences between its pixels and the labels push the student's scale from one.

        The bias would not do: it sees the mean of a batch, which no mix changes.
        """
        fields = {"ce_weight": 0.0, "optimiser": "sgd", "learning_rate": 1.0, "epochs": 2}
        student = prism_jax.fit(
            Mirror(), images(), np.zeros(COUNT), normalisation=GREY,
            **{"soft_labels": records, **fields, **options},
        )  # fmt: skip
        return float(np.abs(student["params"]["scale"] - 1).max())

    assert drift() < 1e-3  # the records know their views
    assert drift(label_seed=5) < 1e-3
    for other in ({"label_seed": 6}, {"mix": "none"}, {"flip": False}, {"crop_min": 0.5}):
        with pytest.raises(UserError, match=f"fit got {next(iter(other))}=.* were made with"):
            drift(**other)
    assert drift(soft_labels=records[:5], epochs=1) < 1e-3  # the first epoch alone
    with pytest.raises(UserError, match="were made with"):
        drift(soft_labels=records[:5], epochs=1, label_seed=6)
    # Records that do not know them: what ``relabel`` does by default, or what is stated.
    plain = list(records)
    assert drift(soft_labels=plain, label_seed=5) < 1e-3
    assert drift(soft_labels=plain, label_seed=6) > 1e-2
    assert drift(soft_labels=plain, label_seed=5, mix="none") > 1e-2
    # Five epochs go through the two labelled ones again, with their views.
    assert drift(label_seed=5, epochs=5) < 1e-3
    assert drift(label_seed=5, epochs=5, soft_labels=[r._replace(epoch=1) for r in records]) > 1e-2
