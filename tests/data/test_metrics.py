"""Metrics files: what is on disk after each line, after a kill, and after a resume."""

from __future__ import annotations

import json
import math
import zlib

import numpy as np
import pytest

from prism_jax.data import metrics
from prism_jax.errors import UserError


def write_steps(path, steps):
    with metrics.MetricsWriter(path) as writer:
        for step in steps:
            writer.write(step, loss=1.0 / (step + 1))


def test_each_line_is_on_disk_before_the_next(tmp_path):
    path = tmp_path / "student" / "0" / "metrics.jsonl"
    writer = metrics.MetricsWriter(path)
    assert not path.parent.exists()  # nothing is opened before there is something to say
    writer.write(0, epoch=1, top1=np.float32(0.5), bn={"resnet18": np.ones(2, np.float64)})
    without = '{"step": 0, "epoch": 1, "top1": 0.5, "bn": {"resnet18": [1.0, 1.0]}}'
    assert path.read_text() == (f'{without[:-1]}, "crc": "{zlib.crc32(without.encode()):08x}"}}\n')
    writer.write(np.int64(1), note="größer")
    assert path.read_text().splitlines()[1].startswith('{"step": 1, "note": "größer", "crc": "')
    writer.close()
    assert metrics.read_lines(path)[1] == {"step": 1, "note": "größer"}


def test_numbers_that_are_not_finite_become_null_and_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
        writer.write(3, loss=math.nan, bn={"a": [1.0, -math.inf]}, top1=0.25)

    def refuse(name):
        raise ValueError(name)

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {
        "step": 3,
        "loss": None,
        "bn": {"a": [1.0, None]},
        "top1": 0.25,
        "not_finite": {"loss": "nan", "bn.a[1]": "-inf"},
        "crc": line["crc"],
    }
    with pytest.raises(ValueError):  # the twin: what json writes by default
        json.loads(json.dumps({"loss": math.nan}), parse_constant=refuse)


def test_a_half_written_last_line_is_not_read_and_the_next_writer_removes_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(2))
    whole = path.read_bytes()
    for half in (b'{"step": 2, "lo', '{"step": 2, "note": "grö'.encode()[:-1], b'{"step": 2}'):
        path.write_bytes(whole + half)
        assert [line["step"] for line in metrics.read_lines(path)] == [0, 1]
        write_steps(path, [2])
        assert [line["step"] for line in metrics.read_lines(path)] == [0, 1, 2]

    path.write_bytes(whole + b'{"step": 2, "lo')  # the twin: appending after the half line
    with path.open("a") as file:
        file.write('{"step": 2}\n')
    with pytest.raises(UserError, match="line 3 of .*metrics.jsonl is damaged"):
        metrics.read_lines(path)


def test_a_flipped_bit_is_never_read_as_a_number(tmp_path):
    path, twins = tmp_path / "metrics.jsonl", 0
    write_steps(path, range(3))
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        for bit in (0, 4):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(UserError, match="metrics.jsonl is damaged"):
                metrics.read_lines(path)
            try:  # the twin: what JSON alone notices
                twins += bool([json.loads(line) for line in path.read_bytes().splitlines()])
            except ValueError:
                pass
    assert twins > 50


def test_a_line_without_a_checksum_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 0.5}\n')
    with pytest.raises(UserError, match="line 1 of .*metrics.jsonl is damaged"):
        metrics.read_lines(path)


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    resumed, whole = tmp_path / "resumed.jsonl", tmp_path / "whole.jsonl"
    write_steps(whole, range(10))
    write_steps(resumed, range(7))  # died here; the checkpoint is at step 5
    twin = tmp_path / "twin.jsonl"
    twin.write_bytes(resumed.read_bytes())

    metrics.truncate(resumed, lambda line: line["step"] < 5)
    write_steps(resumed, range(5, 10))
    assert resumed.read_bytes() == whole.read_bytes()

    write_steps(twin, range(5, 10))  # without the cut, steps 5 and 6 stand twice
    assert twin.read_bytes() != whole.read_bytes()


def test_truncate_keeps_leading_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [0, 1, 5, 2, 3])
    metrics.truncate(path, lambda line: line["step"] < 5)
    assert [line["step"] for line in metrics.read_lines(path)] == [0, 1]


def test_truncate_writes_nothing_where_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.truncate(path, lambda line: True)
    assert not path.exists()
    write_steps(path, range(3))
    before = path.stat()
    metrics.truncate(path, lambda line: line["step"] < 3)
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_gathered_lines_stand_once_and_in_order_of_steps(tmp_path):
    """Steps 2 and 3 of a unit were done again, once by this process and once by another."""
    path, other = tmp_path / "metrics.jsonl", tmp_path / "metrics-00001.jsonl"
    mine = [("a", 1, 0.1), ("a", 2, 0.2), ("b", 2, 9.0), ("a", 2, 0.3), ("a", 3, 0.4)]
    for file, lines in ((path, mine), (other, [("b", 2, 0.5), ("b", 3, 0.6)])):
        with metrics.MetricsWriter(file) as writer:
            for unit, step, loss in lines:
                writer.write(step, unit=unit, loss=loss)
    metrics.gather(tmp_path)
    found = [tuple(line[k] for k in ("unit", "step", "loss")) for line in metrics.read_lines(path)]
    assert found == [("a", 1, 0.1), ("a", 2, 0.3), ("b", 2, 0.5), ("a", 3, 0.4), ("b", 3, 0.6)]
    assert not other.exists()
    before = path.stat()
    metrics.gather(tmp_path)
    assert path.stat() == before  # nothing to write


def test_a_missing_file_has_no_lines(tmp_path):
    assert metrics.read_lines(tmp_path / "metrics.jsonl") == []


def test_tensorboard_events_beside_the_lines(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard events need tensorboardX")
    with metrics.MetricsWriter(tmp_path / "m.jsonl", tmp_path / "events") as writer:
        writer.write(0, loss=0.5, bn={"resnet18": 2.0}, bad=math.nan)
    (events,) = (tmp_path / "events").iterdir()
    assert b"bn/resnet18" in events.read_bytes()
    assert len(metrics.read_lines(tmp_path / "m.jsonl")) == 1


def test_without_tensorboardx_there_are_lines_only(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with metrics.MetricsWriter(tmp_path / "m.jsonl", tmp_path / "events") as writer:
        writer.write(0, loss=0.5)
    assert not (tmp_path / "events").exists()
    assert len(metrics.read_lines(tmp_path / "m.jsonl")) == 1
