"""Soft labels on disk: ArrayRecord shards, one record per batch, and a manifest.

    <root>/labels-00012.array_record   the records of a block of epochs; present means done
    <root>/manifest.json               what they label and how they were made; written last

A record is, in little-endian numbers:

    0   uint32  CRC-32 of all that follows
    4   uint32  epoch
    8   uint32  batch in the epoch
    12  a row per image: ``index``, which image of the set it is, in the smallest unsigned
        integer that holds them all; then the fields of ``core.codec``

Damage is named, never read as data. Views and mixes are not stored: they are functions of
(seed, epoch, batch). ArrayRecord compresses each record with zstd.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import struct
import tempfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from prism_jax.core import codec
from prism_jax.data import workdir
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.pipeline import num_batches, read_batches, share_of
from prism_jax.errors import UserError
from prism_jax.types import SoftLabels

MANIFEST = "manifest.json"
FORMAT = 1

_CHECKSUM_BYTES = 4
_COORDINATES = struct.Struct("<II")
_ROWS_AT = _CHECKSUM_BYTES + _COORDINATES.size
_SMALL_SHARD_BYTES = 4 << 20
_BLOCK = 1 << 16
_WAITING = 8  # records that may wait to be packed


@dataclasses.dataclass(frozen=True)
class LabelPlan:
    """The geometry of a store.

    Attributes:
      count: images in the labelled set.
      num_classes: length of a soft label.
      batch_size: images per record; the last record of an epoch may be ragged.
      epochs: how often the set is labelled.
      precision, top_k: see ``core.codec.Coding``.
      epochs_per_shard: in one file. An ArrayRecord file takes 128 kB however little it holds,
        so small sets put many epochs into one.
    """

    count: int
    num_classes: int
    batch_size: int
    epochs: int
    precision: str = "float16"
    top_k: int | None = None
    epochs_per_shard: int = 1

    @classmethod
    def of(cls, *arguments, **fields) -> LabelPlan:
        """The plan whose shards hold about 4 MB, or one epoch where that is larger."""
        plan = cls(*arguments, **fields)
        together = min(plan.epochs, max(1, _SMALL_SHARD_BYTES // plan.epoch_bytes))
        return dataclasses.replace(plan, epochs_per_shard=together)

    @property
    def coding(self) -> codec.Coding:
        return codec.Coding(self.precision, self.top_k)

    @property
    def row(self) -> np.dtype:
        """The structure of what is kept of one image of one batch."""
        index = np.min_scalar_type(self.count - 1).newbyteorder("<")
        return np.dtype([("index", index), *self.coding.row(self.num_classes).descr])

    @property
    def epoch_bytes(self) -> int:
        """Bytes of an epoch before they are compressed."""
        return self.batches_per_epoch * _ROWS_AT + self.count * self.row.itemsize

    @property
    def batches_per_epoch(self) -> int:
        return num_batches(self.count, self.batch_size)

    @property
    def stored_bytes(self) -> int:
        """What its files take at most: ArrayRecord writes blocks of 64 kB, and one at the end."""
        blocks = -(-self.epochs_per_shard * self.epoch_bytes // _BLOCK) + 1
        return self.num_shards * blocks * _BLOCK

    @property
    def num_shards(self) -> int:
        return -(-self.epochs // self.epochs_per_shard)

    def epochs_of(self, shard: int) -> range:
        """The epochs that a shard holds."""
        first = shard * self.epochs_per_shard
        return range(first, min(first + self.epochs_per_shard, self.epochs))

    def images_of(self, batch: int) -> int:
        """How many images a record labels."""
        return min(self.batch_size, self.count - batch * self.batch_size)


def shard_path(root: epath.PathLike, shard: int) -> epath.Path:
    """Where a shard is stored."""
    return epath.Path(root) / f"labels-{shard:05d}.array_record"


def missing_shards(root: epath.PathLike, plan: LabelPlan) -> list[int]:
    """The shards that are still to be made."""
    there = workdir.names(epath.Path(root))
    return [s for s in range(plan.num_shards) if shard_path(root, s).name not in there]


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
      OSError: there is no room for it.
    """
    expected = ((e, b) for e in plan.epochs_of(shard) for b in range(plan.batches_per_epoch))
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "shard")
        with (
            writing(local),
            contextlib.closing(ArrayRecordWriter(local, "group_size:1,zstd:3")) as writer,
            ThreadPoolExecutor(1) as thread,  # packs while the next ones are labelled
        ):
            waiting: deque[Future[None]] = deque()
            for coordinates, record in zip(expected, records, strict=True):
                assert (record.epoch, record.batch) == coordinates, (record[:2], coordinates)
                waiting.append(thread.submit(lambda one: writer.write(_pack(one, plan)), record))
                if len(waiting) > _WAITING:
                    waiting.popleft().result()
            for written in waiting:
                written.result()
        workdir.write_bytes(shard_path(root, shard), epath.Path(local).read_bytes())


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Say what ArrayRecord's error stands for: an ``OSError`` where it could not write."""
    try:
        yield
    except RuntimeError as error:
        if "write() failed" not in str(error):
            raise
        raise OSError(errno.ENOSPC, str(error).split(";")[0], path) from error


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
        records = _open(os.fspath(workdir.local(path)))
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
    sizes = {path.name: workdir.size(path) for path in paths}
    manifest = {
        "format": FORMAT,
        "row": plan.row.descr,
        "plan": dataclasses.asdict(plan),
        "images": images,
        "teachers": teachers,
        "view": view,
        "shards": sizes,
        "bytes": sum(sizes.values()),
    }
    workdir.write_record(epath.Path(root) / MANIFEST, manifest)


def size_bytes(root: epath.PathLike) -> int:
    """Bytes of all shards and of the manifest on disk."""
    shards = workdir.matching(epath.Path(root), "labels-*.array_record")
    return sum(workdir.size(path) for path in (*shards, epath.Path(root) / MANIFEST))


def rounded(record: SoftLabels, coding: codec.Coding) -> SoftLabels:
    """A record as a store gives it back, without the store.

    Raises:
      UserError: logits that are not finite in the coding's precision.
    """
    logits_BK = codec.decode(_encoded(record, coding), record.logits_BK.shape[1])
    return record._replace(logits_BK=logits_BK)


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
            if self.manifest["format"] != FORMAT:
                raise UserError(
                    f"the soft labels in {root} are of format {self.manifest['format']}; this "
                    f"version reads format {FORMAT}"
                )
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
            if (found := workdir.size(path)) != sizes.get(path.name):
                raise DamagedFile(
                    path, f"is damaged: it has {found} bytes, not {sizes.get(path.name)}"
                )
        self._records: _Downloaded | Sequence[bytes]
        if workdir.is_store(root):
            self._records = _Downloaded(self._paths, self.plan.epochs_per_shard * self._per_epoch)
            return
        # With the number of records stated, a file is opened only when it is first read.
        self._records = _open(
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
        threads: int = 1,
    ) -> Iterator[SoftLabels]:
        """The records that a training of ``epochs`` epochs reads from global batch ``start`` on.

        They come in stored order; a training longer than the store goes through it again from
        its first epoch. ``share`` and ``threads`` as in ``pipeline.batches``.
        """
        total = len(self) if epochs is None else epochs * self._per_epoch
        numbers = share_of(total, start, share)
        return read_batches(numbers, lambda number: self[int(number) % len(self)], threads=threads)


class _Downloaded:
    """The records of all shards, each shard copied from its object store when it is first read."""

    def __init__(self, paths: Sequence[epath.Path], records_per_shard: int):
        self._paths, self._per_shard = paths, records_per_shard
        self._opened: dict[int, Sequence[bytes]] = {}

    def __getitem__(self, number: int) -> bytes:
        shard, at = divmod(number, self._per_shard)
        if shard not in self._opened:  # two threads may both open it
            self._opened[shard] = _open(os.fspath(workdir.local(self._paths[shard])))
        return self._opened[shard][at]


def _encoded(record: SoftLabels, coding: codec.Coding) -> np.ndarray:
    try:
        return codec.encode(np.asarray(record.logits_BK, np.float32), coding)
    except ValueError as error:
        raise UserError(
            f"epoch {record.epoch}, batch {record.batch} has {error}; look at the label teachers, "
            f"or set relabel.precision=float32"
        ) from error


def _pack(record: SoftLabels, plan: LabelPlan) -> bytes:
    assert len(record.index_B) == plan.images_of(record.batch)
    encoded_B = _encoded(record, plan.coding)
    rows_B = np.empty(len(record.index_B), plan.row)
    rows_B["index"] = record.index_B
    assert encoded_B.dtype.names is not None
    for name in encoded_B.dtype.names:
        rows_B[name] = encoded_B[name]
    body = _COORDINATES.pack(record.epoch, record.batch) + rows_B.tobytes()
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little") + body


def _unpack(data: bytes, path: epath.Path, plan: LabelPlan, epoch: int, batch: int) -> SoftLabels:
    where = f"the record of epoch {epoch}, batch {batch}"
    checksum, body = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if len(data) < _ROWS_AT or zlib.crc32(body) != int.from_bytes(checksum, "little"):
        raise DamagedFile(path, f"is damaged: {where} fails its checksum")
    found = _COORDINATES.unpack_from(body)
    if found != (epoch, batch):
        raise DamagedFile(
            path,
            f"is damaged: at the place of {where} is that of epoch {found[0]}, batch {found[1]}",
        )
    wanted = _ROWS_AT + plan.images_of(batch) * plan.row.itemsize
    if len(data) != wanted:
        raise DamagedFile(path, f"is damaged: {where} has {len(data)} bytes, not {wanted}")
    rows_B = np.frombuffer(data, plan.row, offset=_ROWS_AT)
    logits_BK = codec.decode(rows_B, plan.num_classes)
    return SoftLabels(epoch, batch, rows_B["index"].astype(np.int32), logits_BK)


def _open(paths: str | list[str]) -> Sequence[bytes]:
    import grain  # it takes a second: not before labels are read

    return grain.sources.ArrayRecordDataSource(paths)


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """Name the shard in what ArrayRecord raises for damaged bytes."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        reason = str(error).split(";")[0] or "cut short"
        raise DamagedFile(path, f"is damaged ({reason})") from error
