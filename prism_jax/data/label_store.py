"""Soft labels on disk: ArrayRecord shards, one record per batch, and a manifest.

    <root>/labels-00012.array_record   the records of a block of epochs; present means done
    <root>/manifest.json               what they label and how they were made; written last

A record carries its own checksum and coordinates: damage is named, never read as data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from flax import serialization

from prism_jax.data import workdir
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.pipeline import num_batches, read_batches, share_of
from prism_jax.errors import UserError
from prism_jax.types import SoftLabels

MANIFEST = "manifest.json"

_CHECKSUM_BYTES = 4
_SMALL_SHARD_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class LabelPlan:
    """The geometry of a store.

    Attributes:
      count: images in the labelled set.
      num_classes: length of a soft label.
      batch_size: images per record; the last record of an epoch may be ragged.
      epochs: how often the set is labelled.
      precision: dtype of the stored logits, "float16" or "float32".
      epochs_per_shard: in one file. An ArrayRecord file takes 128 kB however little it holds,
        so small sets put many epochs into one.
    """

    count: int
    num_classes: int
    batch_size: int
    epochs: int
    precision: str = "float16"
    epochs_per_shard: int = 1

    @classmethod
    def of(
        cls, count: int, num_classes: int, *, batch_size: int, epochs: int, precision: str
    ) -> LabelPlan:
        """The plan whose shards hold about 4 MB, or one epoch where that is larger."""
        epoch_bytes = count * num_classes * np.dtype(precision).itemsize
        together = min(epochs, max(1, _SMALL_SHARD_BYTES // epoch_bytes))
        return cls(count, num_classes, batch_size, epochs, precision, together)

    @property
    def batches_per_epoch(self) -> int:
        return num_batches(self.count, self.batch_size)

    @property
    def num_shards(self) -> int:
        return -(-self.epochs // self.epochs_per_shard)

    def epochs_of(self, shard: int) -> range:
        """The epochs that a shard holds."""
        first = shard * self.epochs_per_shard
        return range(first, min(first + self.epochs_per_shard, self.epochs))

    def batch_shape(self, batch: int) -> tuple[int, int]:
        """(B, K) of a record."""
        return min(self.batch_size, self.count - batch * self.batch_size), self.num_classes


def shard_path(root: epath.PathLike, shard: int) -> epath.Path:
    """Where a shard is stored."""
    return epath.Path(root) / f"labels-{shard:05d}.array_record"


def missing_shards(root: epath.PathLike, plan: LabelPlan) -> list[int]:
    """The shards that are still to be made."""
    return [s for s in range(plan.num_shards) if not shard_path(root, s).exists()]


def write_shard(
    root: epath.PathLike, plan: LabelPlan, shard: int, records: Iterable[SoftLabels]
) -> None:
    """Write a shard whole.

    Args:
      root: folder of the store.
      plan: its geometry.
      shard: which one.
      records: every batch of ``plan.epochs_of(shard)``, in order.

    Raises:
      UserError: logits that are not finite in the stored precision.
    """
    expected = ((e, b) for e in plan.epochs_of(shard) for b in range(plan.batches_per_epoch))
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "shard")
        with contextlib.closing(ArrayRecordWriter(local, "group_size:1")) as writer:
            for coordinates, record in zip(expected, records, strict=True):
                assert (record.epoch, record.batch) == coordinates, (record[:2], coordinates)
                writer.write(_pack(record, plan))
        workdir.write_bytes(shard_path(root, shard), epath.Path(local).read_bytes())


def check_shard(root: epath.PathLike, plan: LabelPlan, shard: int) -> None:
    """Read a shard from end to end.

    Raises:
      DamagedFile: it is missing, cut short or altered.
    """
    path = shard_path(root, shard)
    if not path.exists():
        raise DamagedFile(path, "is missing")
    wanted = len(plan.epochs_of(shard)) * plan.batches_per_epoch
    with _naming(path):
        records = grain.sources.ArrayRecordDataSource(os.fspath(path))
        if len(records) != wanted:
            raise DamagedFile(path, f"is damaged: it has {len(records)} of {wanted} records")
        for at in range(wanted):
            epoch, batch = divmod(at, plan.batches_per_epoch)
            _unpack(records[at], path, plan, plan.epochs_of(shard)[epoch], batch)


def write_manifest(
    root: epath.PathLike,
    plan: LabelPlan,
    *,
    images: str,
    teachers: dict[str, str],
    view: dict[str, Any],
) -> None:
    """Declare a store complete.

    Args:
      root: its folder; every shard is there.
      plan: its geometry.
      images: digest of the images that the labels belong to.
      teachers: the hash of each label teacher's weights, by name.
      view: what else decided the labels: ensemble, crop, flip, mix, seed.
    """
    paths = [shard_path(root, shard) for shard in range(plan.num_shards)]
    sizes = {path.name: path.stat().length for path in paths}
    manifest = {
        "plan": dataclasses.asdict(plan),
        "images": images,
        "teachers": teachers,
        "view": view,
        "shards": sizes,
        "bytes": sum(sizes.values()),
    }
    workdir.write_json(epath.Path(root) / MANIFEST, manifest)


def size_bytes(root: epath.PathLike) -> int:
    """Bytes of all shards on disk."""
    return sum(p.stat().length for p in epath.Path(root).glob("labels-*.array_record"))


class LabelReader:
    """Random access to the records of a complete store, by global batch number.

    ``reader[epoch * reader.plan.batches_per_epoch + batch]`` is a ``SoftLabels`` with float32
    logits. Reading is thread-safe.

    Args:
      root: folder of the store.
      images: digest of the images to be labelled; None does not compare.

    Raises:
      UserError: the store is not complete, or labels other images.
      DamagedFile: a shard is missing or has another size than when it was written.
    """

    def __init__(self, root: epath.PathLike, *, images: str | None = None):
        root = epath.Path(root)
        if not (root / MANIFEST).exists():
            raise UserError(f"{root} holds no complete soft labels ({MANIFEST} is missing)")
        self.manifest = workdir.read_json(root / MANIFEST)
        try:
            self.plan = LabelPlan(**self.manifest["plan"])
            sizes, labelled = self.manifest["shards"], self.manifest["images"]
        except (KeyError, TypeError) as error:
            raise DamagedFile(
                root / MANIFEST, f"is no manifest of soft labels ({error})"
            ) from error
        if images is not None and images != labelled:
            raise UserError(
                f"the soft labels in {root} belong to images with digest {labelled}, not to these "
                f"({images}); move {root} away and run the same command again to relabel"
            )
        self._paths = [shard_path(root, shard) for shard in range(self.plan.num_shards)]
        for path in self._paths:
            if not path.exists():
                raise DamagedFile(path, "is missing")
            if (found := path.stat().length) != sizes.get(path.name):
                raise DamagedFile(
                    path, f"is damaged: it has {found} bytes, not {sizes.get(path.name)}"
                )
        # With the number of records stated, a file is opened only when it is first read.
        self._records = grain.sources.ArrayRecordDataSource(
            [
                f"{os.fspath(path)}[0:{len(self.plan.epochs_of(shard)) * self._per_epoch}]"
                for shard, path in enumerate(self._paths)
            ]
        )

    @property
    def _per_epoch(self) -> int:
        return self.plan.batches_per_epoch

    def __len__(self) -> int:
        return self.plan.epochs * self._per_epoch

    def __getitem__(self, number: int) -> SoftLabels:
        """The record of a global batch number.

        Raises:
          IndexError: it is outside the store.
          DamagedFile: its shard is damaged.
        """
        number = int(number)
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        epoch, batch = divmod(number, self._per_epoch)
        path = self._paths[epoch // self.plan.epochs_per_shard]
        with _naming(path):
            return _unpack(self._records[number], path, self.plan, epoch, batch)

    def read(
        self,
        *,
        start: int = 0,
        epochs: int | None = None,
        share: tuple[int, int] = (0, 1),
        threads: int = 0,
    ) -> Iterator[SoftLabels]:
        """The records that a training of ``epochs`` epochs reads from global batch ``start`` on.

        They come in stored order; a training longer than the store goes through it again from
        its first epoch. ``share`` and ``threads`` as in ``pipeline.batches``.
        """
        total = len(self) if epochs is None else epochs * self._per_epoch
        numbers = share_of(total, start, share)
        return read_batches(numbers, lambda number: self[int(number) % len(self)], threads=threads)


def _pack(record: SoftLabels, plan: LabelPlan) -> bytes:
    index_B = np.asarray(record.index_B, np.int32)
    with np.errstate(over="ignore"):  # the check below says it better
        logits_BK = np.asarray(record.logits_BK).astype(plan.precision)
    assert logits_BK.shape == plan.batch_shape(record.batch), logits_BK.shape
    assert index_B.shape == logits_BK.shape[:1]
    if not np.isfinite(logits_BK).all():
        raise UserError(
            f"the logits of epoch {record.epoch}, batch {record.batch} are not finite in "
            f"{plan.precision}; look at the label teachers, or set relabel.precision=float32"
        )
    fields = {
        "epoch": int(record.epoch),
        "batch": int(record.batch),
        "index_B": index_B,
        "logits_BK": logits_BK,
    }
    body = serialization.msgpack_serialize(fields)
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little") + body


def _unpack(data: bytes, path: epath.Path, plan: LabelPlan, epoch: int, batch: int) -> SoftLabels:
    checksum, body = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    where = f"the record of epoch {epoch}, batch {batch}"
    if zlib.crc32(body) != int.from_bytes(checksum, "little"):
        raise DamagedFile(path, f"is damaged: {where} fails its checksum")
    fields = serialization.msgpack_restore(body)
    if (fields["epoch"], fields["batch"]) != (epoch, batch):
        raise DamagedFile(
            path,
            f"is damaged: at the place of {where} is that of epoch {fields['epoch']}, batch "
            f"{fields['batch']}",
        )
    if fields["logits_BK"].shape != plan.batch_shape(batch):
        raise DamagedFile(path, f"is damaged: {where} has shape {fields['logits_BK'].shape}")
    return SoftLabels(epoch, batch, fields["index_B"], fields["logits_BK"].astype(np.float32))


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """Name the shard in what ArrayRecord raises for damaged bytes."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        reason = str(error).split(";")[0] or "cut short"
        raise DamagedFile(path, f"is damaged ({reason})") from error
