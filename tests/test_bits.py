"""The benchmark of bits sees what differs, and says of what kind it is."""

from __future__ import annotations

import json
import sys

from helpers.command import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import bits  # noqa: E402


def workdir(root, *, weights: dict[str, bytes], top1: float, seconds: float):
    for name, data in weights.items():
        path = root / "squeeze" / name / "weights.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    record = root / "controls" / "full_real" / "validate" / "student" / "0" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"top1": top1, "seconds": seconds}))
    return root


def test_results_of_other_bits_are_not_counted(tmp_path):
    first = workdir(tmp_path / "first", weights={"a": b"1", "b": b"2"}, top1=0.5, seconds=1.0)
    again = workdir(tmp_path / "again", weights={"a": b"1", "b": b"3"}, top1=0.5, seconds=2.0)
    other = workdir(tmp_path / "other", weights={"a": b"1"}, top1=0.6, seconds=1.0)
    nothing = {"images": [0, 0], "labels": [0, 0]}
    expected = {"teachers": [1, 2], "students": [1, 1], **nothing}
    assert bits.same_bits(again, first) == expected
    assert bits.same_bits(other, first) == {**expected, "students": [0, 1]}
