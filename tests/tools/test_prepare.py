"""Converting TFRecord to array_record, and preparing; TensorFlow is not needed for these tests."""

from __future__ import annotations

import grp
import json
import pwd
import struct

import numpy as np
import pytest
from etils import epath
from helpers.prepared import prepare

from prism_jax.data.sources import open_source, read_all
from prism_jax.tools import prepare as tool

google_crc32c = pytest.importorskip("google_crc32c", reason="the extra `prepare`")

# What TensorFlow 2.21's TFRecordWriter wrote for these three records.
RECORDS = [b"prism", b"", bytes(range(40))]
BY_TENSORFLOW = bytes.fromhex(
    "0500000000000000eab2043e707269736d682faf6c000000000000000029039807d8ea82a22800000000000000ff70164a000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262775118983"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_tensorflows_own_file_is_read(tmp_path):
    path = tmp_path / "some.tfrecord"
    path.write_bytes(BY_TENSORFLOW)
    assert list(tool.read_tfrecord(path)) == RECORDS
    assert framed(RECORDS) == BY_TENSORFLOW  # and so is what these tests write


def test_every_damaged_byte_and_every_cut_is_seen(tmp_path):
    path = tmp_path / "some.tfrecord"
    ends = np.cumsum([16 + len(record) for record in RECORDS])
    for at in range(len(BY_TENSORFLOW)):
        damaged = bytearray(BY_TENSORFLOW)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(tool.UserError, match=r"some.tfrecord is (damaged|cut short)"):
            list(tool.read_tfrecord(path))
        if at and at not in ends:
            path.write_bytes(BY_TENSORFLOW[:at])
            with pytest.raises(tool.UserError, match="cut short"):
                list(tool.read_tfrecord(path))


def framed(records: list[bytes]) -> bytes:
    def with_checksum(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return data + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    parts = ((struct.pack("<Q", len(record)), record) for record in records)
    return b"".join(with_checksum(part) for pair in parts for part in pair)


def as_tfrecord(folder) -> None:
    """Store a set prepared as array_record as TFRecord instead."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for path in folder.glob("*.array_record-*"):
        records = ArrayRecordDataSource(str(path))
        data = framed([records[i] for i in range(len(records))])
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(data)
        path.unlink()
    info = folder / "dataset_info.json"
    meta = json.loads(info.read_text())
    del meta["fileFormat"]  # as old versions of TFDS
    info.write_text(json.dumps(meta))


def opened(path, split="train"):
    return open_source(name="cifar10", source="tfds", path=path, split=split, image_size=32)


def run(capsys, *arguments):
    status = tool.main([f"--{a}" for a in arguments])
    out, err = capsys.readouterr()
    return status, out + err


@pytest.fixture
def old(tmp_path):
    """A data_dir with CIFAR-10 as TFRecord, and what it held as array_record."""
    folder = prepare(tmp_path / "old")
    pictures = {split: read_all(opened(tmp_path / "old", split)) for split in ("train", "test")}
    described = opened(tmp_path / "old").describe()
    as_tfrecord(folder)
    return tmp_path / "old", folder, pictures, described


def test_a_converted_set_is_the_set(old, tmp_path, capsys):
    source, folder, pictures, described = old
    before = {p: p.read_bytes() for p in folder.iterdir()}
    to = tmp_path / "new"
    with pytest.raises(tool.UserError, match="stored as tfrecord") as error:
        opened(source)
    command = next(line for line in str(error.value).splitlines() if "prism_jax.tools" in line)
    arguments = command.split("prism_jax.tools.prepare ")[1].replace(
        "<data_dir for the result>", str(to)
    )
    status, said = run(capsys, *arguments.replace("--", "").split())
    assert status == 0, said
    assert f"--config.dataset.path={to}" in said
    for split, (images, labels) in pictures.items():
        found = read_all(opened(to, split))
        np.testing.assert_array_equal(found[0], images)
        np.testing.assert_array_equal(found[1], labels)
    assert opened(to).describe() == described
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert (
        run(capsys, "dataset=cifar10", f"from={source}", f"to={to}")[1].count("there already") == 1
    )


def test_a_stopped_conversion_goes_on(old, tmp_path, capsys, monkeypatch):
    source, _, pictures, _ = old
    to, convert = tmp_path / "new", tool.convert_shard
    done = []

    def stop_at_second(shard):
        if done:
            raise KeyboardInterrupt
        done.append(shard)
        convert(shard)

    monkeypatch.setattr(tool, "convert_shard", stop_at_second)
    monkeypatch.setattr(tool.os, "cpu_count", lambda: 1)
    arguments = ("dataset=cifar10", f"from={source}", f"to={to}")
    assert run(capsys, *arguments)[0] == 130
    with pytest.raises(tool.UserError, match="nothing is prepared there"):
        opened(to)
    times = {p: p.stat().st_mtime_ns for p in to.rglob("*array_record*")}
    assert len(times) == 1
    monkeypatch.setattr(tool, "convert_shard", convert)
    assert run(capsys, *arguments)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in times} == times
    np.testing.assert_array_equal(read_all(opened(to))[0], pictures["train"][0])


def test_a_file_with_too_few_records_is_not_passed_on(old, tmp_path, capsys):
    source, folder, *_ = old
    (path,) = folder.glob("*train*")
    path.write_bytes(framed([b"x"]))
    status, said = run(capsys, "dataset=cifar10", f"from={source}", f"to={tmp_path / 'new'}")
    assert status == 2 and "has 1 records and should have 12" in said
    assert not list((tmp_path / "new").rglob("cifar10-train.array_record*"))
    path.unlink()
    status, said = run(capsys, "dataset=cifar10", f"from={source}", f"to={tmp_path / 'new'}")
    assert status == 2 and "train.tfrecord-00000-of-00001 is missing" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["dataset=cifar100", "from={old}", "to={new}"],
            "holds no prepared cifar100, only cifar10",
        ),
        (["dataset=cifar10", "from={old}", "to={old}"], "is where the set is already"),
        (["dataset=cifar10", "from={new}", "to={new}"], "there is no folder"),
        (["dataset=cifar10", "from={old}", "to={new}", "downloads={old}"], "give one of them"),
        (["dataset=cifar10"], "required: --to"),
        (["dataset=no_such_set_anywhere", "to={new}"], "could not prepare no_such_set_anywhere"),
    ],
)
def test_mistakes_are_told(old, tmp_path, capsys, arguments, words):
    given = [a.format(old=old[0], new=tmp_path / "new") for a in arguments]
    status, said = run(capsys, *given)
    assert status == 2 and words in said, said


def test_the_files_of_a_user_without_a_name_are_measured(old, tmp_path, monkeypatch):
    _, folder, _, _ = old
    for module, ask in ((pwd, "getpwuid"), (grp, "getgrgid")):
        monkeypatch.setattr(module, ask, {}.__getitem__)
    shards = [tool.Shard(p, tmp_path / p.name, 1) for p in map(epath.Path, folder.iterdir())]
    tool._check_room(shards, epath.Path(tmp_path))


def test_no_room_is_said_before_anything_is_written(old, tmp_path, capsys, monkeypatch):
    usage = tool.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: usage)
    status, said = run(capsys, "dataset=cifar10", f"from={old[0]}", f"to={tmp_path / 'new'}")
    assert status == 2 and "has 0.0 GB free" in said
    assert not (tmp_path / "new").exists()


def test_preparing_goes_through_tfds(tmp_path, capsys, monkeypatch):
    import tensorflow_datasets as tfds

    class Builder:
        data_path = str(tmp_path / "new" / "some" / "1.0.0")

        def __init__(self, name, data_dir, file_format):
            assert (name, file_format) == ("some", "array_record")

        def download_and_prepare(self, download_config):
            assert download_config.manual_dir == "tars"
            if not ready:
                raise ImportError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds, "builder", Builder)
    arguments = ("dataset=some", f"to={tmp_path / 'new'}", "downloads=tars")
    ready = False
    status, said = run(capsys, *arguments)
    assert status == 2 and "pip install 'prism-jax[prepare]'" in said
    ready = True
    assert run(capsys, *arguments)[0] == 0
