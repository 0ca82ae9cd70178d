"""Prepare a TFDS set for reading at random, once: python -m prism_jax.tools.prepare

    --dataset=NAME --from=DIR --to=DIR        convert what is prepared as TFRecord in DIR
    --dataset=NAME --to=DIR [--downloads=DIR] download (or take from --downloads) and prepare

NAME is a builder's, with its configuration where it has several: imagenet2012, cifar10,
imagenette/320px-v2. Afterwards dataset.source=tfds reads --to as dataset.path.

A conversion copies the records byte for byte into array_record files; it needs no TensorFlow,
changes nothing in --from, takes as much disk again, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from prism_jax import progress
from prism_jax.data import workdir
from prism_jax.data.label_store import writing
from prism_jax.data.sources import tfds as tfds_source
from prism_jax.errors import UserError
from prism_jax.paths import at_home
from prism_jax.tools import cli

_FETCH = "prepare or fetch it again"


# --- TFRecord -> array_record -----------------------------------------------------------------


class Shard(NamedTuple):
    """One file to convert, and how many records it must have."""

    source: epath.Path
    target: epath.Path
    records: int


def convert(dataset: str, source: str, to: str) -> epath.Path:
    """Convert a set prepared as TFRecord.

    Args:
      dataset: the builder, with or without its configuration.
      source: its folder, or a data_dir that holds it.
      to: the data_dir for the result.

    Returns:
      The folder of the result; its dataset_info.json is written last.

    Raises:
      UserError: nothing to convert there, no room, or a damaged file.
    """
    import tensorflow_datasets as tfds

    folder, meta = _chosen(dataset, source)
    parts = [meta["name"], meta.get("configName", ""), meta["version"]]
    out = epath.Path(to).joinpath(*filter(None, parts))
    if out.resolve() == folder.resolve():
        raise UserError(f"--to={to} is where the set is already; name another data_dir")
    if (out / tfds_source.INFO).exists():
        progress.say(f"{out} is there already")
        return out
    splits = tfds.builder_from_directory(folder).info.splits
    shards = [shard for split in splits.values() for shard in _shards(split, out)]
    _check_room(shards, out)
    out.mkdir(parents=True, exist_ok=True)
    total = sum(shard.records for shard in shards)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress.task(f"convert {'/'.join(filter(None, parts))}", total, unit="record") as bar,
    ):
        for shard, _ in zip(shards, pool.map(convert_shard, shards), strict=True):
            bar.advance(shard.records)
    records = {shard.source for shard in shards}
    for file in folder.iterdir():
        if file not in records and file.is_file() and file.name != tfds_source.INFO:
            workdir.write_bytes(out / file.name, file.read_bytes())
    converted = {k: v for k, v in meta.items() if k != "alternativeFileFormats"}
    converted["fileFormat"] = tfds_source.ARRAY_RECORD
    workdir.write_json(out / tfds_source.INFO, converted)
    return out


def convert_shard(shard: Shard) -> None:
    """Convert one file; present means done."""
    from array_record.python.array_record_module import ArrayRecordWriter

    if shard.target.exists():
        return
    temporary = shard.target.with_name(f".{shard.target.name}.tmp")
    count = 0
    # One record a group, as TFDS writes them: a record is read without its neighbours.
    local = os.fspath(temporary)
    with writing(local), contextlib.closing(ArrayRecordWriter(local, "group_size:1")) as writer:
        for record in read_tfrecord(shard.source):
            writer.write(record)
            count += 1
    if count != shard.records:
        raise UserError(
            f"{shard.source} has {count} records and should have {shard.records}; {_FETCH}"
        )
    temporary.replace(shard.target)


def read_tfrecord(path: epath.PathLike) -> Iterator[bytes]:
    """The records of a TFRecord file, each compared with its checksum.

    A record is its length (8 bytes, little endian), the checksum of the length, its bytes, and
    their checksum. The checksum is CRC-32C, masked: rotated right by 15 bits, plus a constant.

    Raises:
      UserError: the file is cut short or damaged.
    """
    import google_crc32c

    def masked(data: bytes) -> int:
        crc = google_crc32c.value(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    def checked(size: int) -> bytes:
        data, checksum = file.read(size), file.read(4)
        if len(data) != size or len(checksum) != 4:
            raise UserError(f"{path} is cut short at byte {file.tell()}; {_FETCH}")
        if struct.unpack("<I", checksum)[0] != masked(data):
            raise UserError(f"{path} is damaged before byte {file.tell()}; {_FETCH}")
        return data

    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        while file.tell() < end:
            (length,) = struct.unpack("<Q", checked(8))
            yield checked(min(length, end))


def _chosen(dataset: str, source: str) -> tuple[epath.Path, dict[str, Any]]:
    """The folder to convert, and what it says of itself: of several versions the newest."""
    name, _, config = dataset.partition("/")
    if not epath.Path(source).is_dir():
        raise UserError(f"there is no folder {source}; --from must hold a prepared {dataset}")
    folders = tfds_source.prepared_folders(source)
    found = {
        folder: meta
        for folder, meta in folders.items()
        if meta.get("name") == name and (not config or meta.get("configName", "") == config)
    }
    if not found:
        there = sorted("/".join(_kind(meta)) for meta in folders.values())
        raise UserError(
            f"{source} holds no prepared {dataset}" + (f", only {', '.join(there)}" * bool(there))
        )
    stored = {f: m for f, m in found.items() if tfds_source.formats(m)[0] == tfds_source.TFRECORD}
    if not stored:
        formats = sorted({tfds_source.formats(meta)[0] for meta in found.values()})
        raise UserError(
            f"{source} is stored as {', '.join(formats)}, not as TFRecord; if that is "
            f"{tfds_source.ARRAY_RECORD}, set dataset.path to it"
        )
    kinds = sorted({"/".join(_kind(meta)) for meta in stored.values()})
    if len(kinds) > 1:
        raise UserError(f"{source} holds {', '.join(kinds)}; say which by --dataset")
    folder = tfds_source.newest(stored)
    return folder, stored[folder]


def _kind(meta: dict[str, Any]) -> list[str]:
    return [part for part in (str(meta.get("name")), meta.get("configName", "")) if part]


def _shards(split: Any, out: epath.Path) -> list[Shard]:
    template = split.filename_template.replace(
        data_dir=out, filetype_suffix=tfds_source.ARRAY_RECORD
    )
    shards = []
    for i, (source, count) in enumerate(zip(split.filepaths, split.shard_lengths, strict=True)):
        target = template.sharded_filepath(shard_index=i, num_shards=split.num_shards)
        if not epath.Path(source).exists():
            raise UserError(f"{source} is missing; {_FETCH}")
        shards.append(Shard(epath.Path(source), epath.Path(target), count))
    return shards


def _check_room(shards: Sequence[Shard], out: epath.Path) -> None:
    needed = sum(workdir.size(s.source) for s in shards if not s.target.exists())
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{out} needs about {needed / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free; "
            f"name another --to"
        )


# --- original files -> array_record -----------------------------------------------------------


def prepare(dataset: str, to: str, downloads: str | None) -> epath.Path:
    """Let TensorFlow Datasets download and prepare a set as array_record.

    Returns:
      Its folder.

    Raises:
      UserError: TensorFlow or the files are missing, or TFDS cannot prepare it.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset, data_dir=to, file_format=tfds_source.ARRAY_RECORD)
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=downloads)
        )
    except ImportError as error:
        raise UserError(
            f"preparing {dataset} from its original files takes TensorFlow ({error}): "
            f"pip install 'prism-jax[prepare]'"
        ) from error
    except Exception as error:  # whatever builders, downloads and archives may raise
        raise UserError(f"TensorFlow Datasets could not prepare {dataset}: {error}") from error
    return epath.Path(builder.data_path)


# --- the command line -------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status.
    """
    return cli.run(
        _command, _parser(), argv, "the same command goes on with the files that are left."
    )


def _command(given: argparse.Namespace) -> None:
    if given.source and given.downloads:
        raise UserError("--from converts and --downloads prepares; give one of them")
    if given.source:
        _require_crc32c()
        folder = convert(given.dataset, given.source, given.to)
    else:
        folder = prepare(given.dataset, given.to, given.downloads)
    print(f"{folder} is ready: --config.dataset.source=tfds --config.dataset.path={given.to}")


def _require_crc32c() -> None:
    try:
        import google_crc32c  # noqa: F401
    except ImportError:
        raise UserError(
            "checking TFRecord files takes google-crc32c: pip install google-crc32c "
            "(or 'prism-jax[prepare]', which brings TensorFlow too)"
        ) from None


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m prism_jax.tools.prepare",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="a builder of TensorFlow Datasets")
    add(
        "--from",
        dest="source",
        type=at_home,
        metavar="DIR",
        help="where it is prepared as TFRecord",
    )
    add("--to", type=at_home, required=True, metavar="DIR", help="the data_dir for the result")
    add("--downloads", type=at_home, metavar="DIR", help="files that have to be downloaded by hand")
    return parser


if __name__ == "__main__":
    sys.exit(main())
