"""The code of docs/labels.md reads a store as it says."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest
from helpers.command import reference

from prism_jax.core.codec import Coding
from prism_jax.data import label_store
from prism_jax.data.label_store import LabelPlan, LabelReader
from prism_jax.types import SoftLabels

__all__ = ["reference"]  # a fixture

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "labels.md"


def code(word: str, replaced: dict[str, str]) -> str:
    """The page's code block that has a word in it, with parts replaced."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if word in b)
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, new)
    return block


@pytest.mark.parametrize(
    "coding", [Coding(p, k) for p in ("float32", "float16", "int8") for k in (None, 3)], ids=str
)
def test_numpy_alone_reads_every_coding(tmp_path, coding):
    plan = LabelPlan(300, 11, 64, 3, coding.precision, coding.top_k, epochs_per_shard=2)
    draw = np.random.default_rng(0)
    for shard in range(plan.num_shards):
        records = [
            SoftLabels(
                epoch,
                batch,
                draw.permutation(300)[: plan.images_of(batch)].astype(np.int32),
                draw.normal(size=(plan.images_of(batch), 11)).astype(np.float32),
            )
            for epoch in plan.epochs_of(shard)
            for batch in range(plan.batches_per_epoch)
        ]
        label_store.write_shard(tmp_path, plan, shard, records)
    label_store.write_manifest(tmp_path, plan, images="", teachers={}, view={})
    found: dict = {}
    exec(code("ArrayRecordReader", {"runs/digits_ipc10/relabel": str(tmp_path)}), found)
    assert list(found["labels"]) == [(e, b) for e in range(3) for b in range(5)]
    for record in LabelReader(tmp_path).read():
        index_B, logits_BK = found["labels"][record.epoch, record.batch]
        np.testing.assert_array_equal(index_B, record.index_B)
        np.testing.assert_array_equal(logits_BK, record.logits_BK)


def test_pytorch_sees_what_the_teachers_saw(reference):
    """On the tiny run: four classes, two images each; six epochs, of which nine are asked for."""
    torch = pytest.importorskip("torch")
    tiny = {"runs/digits_ipc10": str(reference), "10, 10)": "4, 2)", "epochs=150": "epochs=9"}
    batches: list = []
    exec(code("import torch", tiny), {"train": lambda *batch: batches.append(batch)})
    assert len(batches) == 18
    for x, logits, hard in batches:
        assert x.shape == (4, 1, 8, 8) and logits.shape == (4, 4) and hard.shape == (4,)
        assert x.dtype == logits.dtype == torch.float32 and torch.isfinite(x).all()
    for again, first in zip(batches[12:], batches, strict=False):
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
