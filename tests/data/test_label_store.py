from __future__ import annotations

import dataclasses
import grp
import pwd
import shutil

import numpy as np
import pytest
from etils import epath

from prism_jax.core.codec import PRECISIONS
from prism_jax.data import label_store, workdir
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.label_store import (
    LabelPlan,
    LabelReader,
    check_shard,
    missing_shards,
    rounded,
    shard_path,
    size_bytes,
    write_manifest,
    write_shard,
)
from prism_jax.errors import UserError
from prism_jax.types import SoftLabels

PLAN = LabelPlan(count=7, num_classes=4, batch_size=3, epochs=5, epochs_per_shard=2)


def record(epoch: int, batch: int, plan: LabelPlan = PLAN) -> SoftLabels:
    rng = np.random.default_rng([epoch, batch])
    shape = plan.images_of(batch), plan.num_classes
    index_B = rng.permutation(plan.count)[: shape[0]].astype(np.int32)
    return SoftLabels(epoch, batch, index_B, rng.normal(size=shape).astype(np.float16))


def records(shard: int, plan: LabelPlan = PLAN) -> list[SoftLabels]:
    return [
        record(e, b, plan) for e in plan.epochs_of(shard) for b in range(plan.batches_per_epoch)
    ]


def write_store(root, plan: LabelPlan = PLAN) -> None:
    for shard in missing_shards(root, plan):
        write_shard(root, plan, shard, records(shard, plan))
    write_manifest(root, plan, images="abc", teachers={"t": "1"}, view={"flip": True, "seed": 0})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    write_store(root)
    return root


@pytest.fixture
def store(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "store")


def flip(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def same(found: SoftLabels, wanted: SoftLabels, plan: LabelPlan = PLAN) -> bool:
    wanted = rounded(wanted, plan.coding)
    return (
        (found.epoch, found.batch) == (wanted.epoch, wanted.batch)
        and np.array_equal(found.index_B, wanted.index_B)
        and np.array_equal(found.logits_BK, wanted.logits_BK)
    )


def test_round_trip_in_any_order(pristine):
    reader = LabelReader(pristine, images="abc")
    wanted = [r for shard in range(PLAN.num_shards) for r in records(shard)]
    assert len(reader) == len(wanted) == 15
    for number in np.random.default_rng(0).permutation(len(reader)):
        found = reader[number]
        assert same(found, wanted[number])
        assert found.logits_BK.dtype == np.float32 and found.index_B.dtype == np.int32
    assert reader[2].logits_BK.shape == (1, 4)  # 7 images in threes: the last batch is ragged
    assert not same(reader[3], wanted[4])
    with pytest.raises(IndexError):
        reader[15]


@pytest.mark.parametrize("threads", [0, 2])
def test_reading_on_from_a_batch_and_in_shares(pristine, threads):
    reader = LabelReader(pristine)
    whole = [(r.epoch, r.batch) for r in reader.read(threads=threads)]
    assert whole == [(e, b) for e in range(5) for b in range(3)]
    assert [(r.epoch, r.batch) for r in reader.read(start=4, threads=threads)] == whole[4:]
    assert [(r.epoch, r.batch) for r in reader.read(epochs=2, threads=threads)] == whole[:6]
    parts = [[(r.epoch, r.batch) for r in reader.read(share=(p, 2))] for p in range(2)]
    assert parts == [whole[0::2], whole[1::2]]
    # A training of twelve epochs reads the five of the store in stored order, over and over.
    again = [(r.epoch, r.batch) for r in reader.read(epochs=12, threads=threads)]
    assert again == whole + whole + whole[:6]
    later = [(r.epoch, r.batch) for r in reader.read(epochs=12, start=17, threads=threads)]
    assert later == again[17:]


def test_manifest_says_what_was_labelled_and_what_it_costs(pristine):
    manifest = LabelReader(pristine).manifest
    shards = sum(p.stat().st_size for p in pristine.glob("labels-*"))
    everything = sum(p.stat().st_size for p in pristine.iterdir())
    assert manifest["bytes"] == shards > 0 and size_bytes(pristine) == everything > shards
    assert manifest["images"] == "abc" and manifest["teachers"] == {"t": "1"}
    assert manifest["view"] == {"flip": True, "seed": 0}
    with pytest.raises(UserError, match="belong to images with digest abc"):
        LabelReader(pristine, images="abd")


def test_a_process_whose_user_and_group_have_no_name_writes_and_reads(tmp_path, monkeypatch):
    """As in a container that runs under any number; epath's stat asks for both names."""
    for module, ask in ((pwd, "getpwuid"), (grp, "getgrgid")):
        monkeypatch.setattr(module, ask, {}.__getitem__)
    write_store(tmp_path)
    with pytest.raises(KeyError):
        epath.Path(tmp_path / "manifest.json").stat()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert size_bytes(tmp_path) == sum(sizes) and len(sizes) == 4
    assert same(LabelReader(tmp_path)[4], record(1, 1))


def test_a_stopped_relabel_continues_at_the_missing_shards(pristine, tmp_path):
    assert missing_shards(tmp_path, PLAN) == [0, 1, 2]
    write_shard(tmp_path, PLAN, 1, records(1))

    def killed():
        yield record(0, 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, PLAN, 0, killed())
    assert [p.name for p in tmp_path.iterdir()] == ["labels-00001.array_record"]
    assert missing_shards(tmp_path, PLAN) == [0, 2]
    with pytest.raises(UserError, match="no complete soft labels"):
        LabelReader(tmp_path)
    write_store(tmp_path)
    for path in pristine.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_shards_hold_every_batch_once_in_order(tmp_path):
    wrong = records(0)
    for broken in (wrong[:-1], wrong + wrong[:1]):
        with pytest.raises(ValueError):
            write_shard(tmp_path, PLAN, 0, broken)
    with pytest.raises(AssertionError):
        write_shard(tmp_path, PLAN, 0, [wrong[1], wrong[0], *wrong[2:]])
    assert missing_shards(tmp_path, PLAN) == [0, 1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_logits_that_float16_cannot_hold_are_refused(tmp_path, value):
    bad = records(0)
    logits = bad[4].logits_BK.astype(np.float32)
    logits[0, 0] = value
    bad[4] = bad[4]._replace(logits_BK=logits)
    with pytest.raises(
        UserError, match="epoch 1, batch 1 has logits that are not finite in float16"
    ):
        write_shard(tmp_path, PLAN, 0, bad)
    if np.isfinite(value):
        write_shard(tmp_path, dataclasses.replace(PLAN, precision="float32"), 0, bad)


def test_small_sets_share_shards_and_large_epochs_do_not():
    small = LabelPlan.of(100, 10, batch_size=50, epochs=300)
    assert small.num_shards == 1
    large = LabelPlan.of(50_000, 1000, batch_size=50, epochs=300)
    assert large.num_shards == 300
    between = LabelPlan.of(1000, 1000, batch_size=50, epochs=5)
    assert [list(between.epochs_of(s)) for s in range(between.num_shards)] == [[0, 1], [2, 3], [4]]
    pruned = LabelPlan.of(1000, 1000, batch_size=50, epochs=300, precision="int8", top_k=100)
    assert pruned.epochs_per_shard == 17


@pytest.mark.parametrize("count", [50, 5000])
def test_what_files_take_is_at_most_what_is_planned(tmp_path, count):
    """A plan says how much disk a run will need, before there is anything."""
    plan = LabelPlan.of(count, 10, batch_size=50, epochs=6)
    write_store(tmp_path, plan)
    files = sum(path.stat().st_size for path in tmp_path.glob("*.array_record"))
    assert 0.5 * plan.stored_bytes < files <= plan.stored_bytes


# --- what is kept -----------------------------------------------------------------------------

KEPT = [
    dataclasses.replace(PLAN, precision=precision, top_k=top_k)
    for precision in PRECISIONS
    for top_k in (None, 2)
]


@pytest.mark.parametrize("plan", KEPT, ids=lambda plan: f"{plan.precision}-{plan.top_k}")
def test_every_coding_comes_back_and_a_killed_relabel_continues(tmp_path, plan):
    def killed():
        yield from records(0, plan)[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, plan, 0, killed())
    assert list(tmp_path.iterdir()) == []  # nothing half written
    write_shard(tmp_path, plan, 2, records(2, plan))
    assert missing_shards(tmp_path, plan) == [0, 1]
    write_store(tmp_path, plan)
    for shard in range(plan.num_shards):
        check_shard(tmp_path, plan, shard)
    reader = LabelReader(tmp_path)
    assert reader.plan == plan
    for found in reader.read():
        exact = record(found.epoch, found.batch, plan)
        assert same(found, exact, plan) and found.logits_BK.dtype == np.float32
        if plan.top_k or plan.precision == "int8":  # of these float16 logits
            assert not np.array_equal(found.logits_BK, exact.logits_BK.astype(np.float32))


@pytest.mark.parametrize(("count", "size"), [(1, 1), (256, 1), (257, 2), (65_537, 4)])
def test_an_index_takes_as_few_bytes_as_hold_the_last_image(tmp_path, count, size):
    plan = LabelPlan(count, 4, batch_size=count, epochs=1, precision="int8")
    assert plan.row["index"].itemsize == size
    write_store(tmp_path, plan)
    found = LabelReader(tmp_path)[0]
    assert found.index_B.dtype == np.int32
    np.testing.assert_array_equal(np.sort(found.index_B), np.arange(count))


def test_a_record_is_its_rows_and_twelve_bytes(tmp_path):
    for plan in KEPT:
        packed = label_store._pack(record(3, 2, plan), plan)
        assert len(packed) == 12 + plan.images_of(2) * plan.row.itemsize
        assert np.frombuffer(packed, "<u4", count=3)[1:].tolist() == [3, 2]
        assert plan.epoch_bytes == sum(len(label_store._pack(r, plan)) for r in records(2, plan))


def test_a_store_of_another_format_is_refused(store):
    path = store / "manifest.json"
    workdir.write_record(path, {**workdir.read_json(path), "format": 2})
    with pytest.raises(UserError, match="are of format 2; this version reads format 1"):
        LabelReader(store)


@pytest.mark.parametrize("keep", [0, 10, 70_000, 131_071])
def test_truncated_shards_are_named(store, keep):
    path = shard_path(store, 1)
    path.write_bytes(path.read_bytes()[:keep])
    for read in (lambda: LabelReader(store), lambda: check_shard(store, PLAN, 1)):
        with pytest.raises(DamagedFile, match="labels-00001.array_record is damaged") as error:
            read()
        assert error.value.path == path


def test_missing_and_incomplete_shards_are_named(store):
    short = dataclasses.replace(PLAN, epochs=3)  # its shard 1 holds one epoch instead of two
    path = shard_path(store, 1)
    path.unlink()
    for read in (lambda: LabelReader(store), lambda: check_shard(store, PLAN, 1)):
        with pytest.raises(DamagedFile, match="is missing"):
            read()
    write_shard(store, short, 1, records(1, short))
    with pytest.raises(DamagedFile, match="3 of 6 records"):
        check_shard(store, PLAN, 1)
    check_shard(store, PLAN, 0)


def used_bytes(path) -> list[int]:
    """Offsets of all bytes that are not padding."""
    return np.flatnonzero(np.frombuffer(path.read_bytes(), np.uint8)).tolist()


def test_flipped_bits_are_named_or_harmless_never_read(store):
    path = shard_path(store, 0)
    content, offsets = path.read_bytes(), used_bytes(shard_path(store, 0))
    rng = np.random.default_rng(0)
    head = rng.integers(0, 8 * 200, 20)  # file and chunk headers
    body = 8 * rng.choice(offsets, 40) + rng.integers(0, 8, 40)  # headers, payload, index, footer
    padding = rng.integers(0, 8 * len(content), 10)
    detected = 0
    for bit in np.concatenate([head, body, padding]).tolist():
        path.write_bytes(content)
        flip(path, bit)
        reader = LabelReader(store)
        try:
            for number in range(6):
                assert same(reader[number], record(*divmod(number, 3)))
        except DamagedFile as error:
            assert error.path == path
            detected += 1
        assert same(reader[6], record(2, 0))  # the other shards stay readable
    assert detected > 20


def test_the_checksum_of_a_record_sees_every_bit():
    packed = label_store._pack(record(0, 0), PLAN)
    path = shard_path("somewhere", 0)
    assert same(label_store._unpack(packed, path, PLAN, 0, 0), record(0, 0))
    misread = 0
    for bit in range(8 * len(packed)):
        data = bytearray(packed)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedFile, match="checksum"):
            label_store._unpack(bytes(data), path, PLAN, 0, 0)
        # The twin without a checksum reads altered logits as data.
        values = np.frombuffer(bytes(data), PLAN.row, offset=12)["values"]
        misread += not np.array_equal(values, record(0, 0).logits_BK)
    assert misread == 8 * 2 * 3 * 4


def test_a_record_in_the_wrong_place_is_not_taken_for_another(store):
    shutil.copy(shard_path(store, 0), shard_path(store, 1))
    for read in (lambda: LabelReader(store)[6], lambda: check_shard(store, PLAN, 1)):
        with pytest.raises(DamagedFile, match="epoch 2, batch 0 is that of epoch 0, batch 0"):
            read()


def test_a_damaged_manifest_is_named(store):
    (store / "manifest.json").write_text('{"plan": {}}')
    with pytest.raises(DamagedFile, match="manifest.json"):
        LabelReader(store)
    (store / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json"):
        LabelReader(store)
