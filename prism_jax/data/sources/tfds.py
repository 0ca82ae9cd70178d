"""Sets prepared by TensorFlow Datasets as array_record, read without TensorFlow.

Images are decoded by our own decoder. Files of the format TFRecord cannot be read at random; they
are converted once by ``python -m prism_jax.tools.prepare``.
"""

from __future__ import annotations

import glob
import json
import os
import re
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from prism_jax import progress
from prism_jax.core.pixels import IMAGENET
from prism_jax.data.datasets import DATASETS, TFDS, DatasetInfo, imagenet_positions
from prism_jax.data.sources.arrays import check_labels
from prism_jax.data.sources.base import ImageSource, cached, existing, file_state
from prism_jax.data.sources.decoding import UNREADABLE_LABEL, EncodedSource
from prism_jax.errors import UserError
from prism_jax.types import Normalisation

INFO = "dataset_info.json"
ARRAY_RECORD, TFRECORD = "array_record", "tfrecord"

_AT_ONCE = 256


def open_tfds(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """A data set prepared by TensorFlow Datasets as array_record; TensorFlow is not needed."""
    found = find(info, path)
    builder = found.builder
    names = {"train": ("train",), "test": info.test_splits}[split]
    name = next((name for name in names if name in builder.info.splits), None)
    if name is None:
        raise UserError(
            f"{found.folder} has no split {' or '.join(names)}, only "
            f"{', '.join(builder.info.splits)}; {expected(info, path)}"
        )
    shards = [epath.Path(shard) for shard in builder.info.splits[name].filepaths]
    if absent := [shard for shard in shards if not shard.exists()]:
        raise UserError(
            f"{absent[0]} is missing ({len(absent)} of the {len(shards)} files of the split "
            f"{name}); {expected(info, path)}"
        )
    import tensorflow_datasets as tfds

    records = builder.as_data_source(
        name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    statistics = builder.info.splits[name]
    shape = (statistics.num_bytes, list(statistics.shard_lengths))
    labels = builder.info.features[found.label_key]

    def stamp() -> str:
        return repr([file_state(shard) for shard in shards])

    def read_labels() -> np.ndarray:
        title = f"read the labels of {builder.info.full_name}, {name}, once"
        labels_N = cached(
            "labels", stamp(), lambda: _read_labels(records, found.label_key, title=title)
        )
        readable_M = labels_N[labels_N != UNREADABLE_LABEL]
        check_labels(f"{found.folder}", name, readable_M, len(readable_M), labels.num_classes)
        return labels_N

    def content() -> bytes:
        return repr(shape).encode() + source.all_labels_N.astype("<i4").tobytes()

    source = EncodedSource(
        info,
        split,
        size,
        count=len(records),
        labels=read_labels,
        num_classes=labels.num_classes,
        class_names=tuple(labels.names),
        read=lambda i: _feature(records, i, found.image_key).bytes_list.value[0],
        name=lambda i: f"{found.folder}, {name} record {i}",
        content=content,
        stamp=stamp,
        title=builder.info.full_name,
    )
    return source


def builder_info(name: str, path: str | None) -> DatasetInfo:
    """What a prepared set outside our table says of itself; ``name`` is "tfds:<builder>".

    Its normalisation is ImageNet's, or mean and deviation 1/2 for grey images, where the config
    states no other. Images of varying sizes are cropped as ImageNet's are.

    Raises:
      UserError: it is not there, or is no image classification set.
    """
    wanted = name.removeprefix(TFDS)
    bare = DatasetInfo(name, 1, 1, 3, IMAGENET, flip=True, tfds_name=wanted)
    found = find(bare, path)
    features = found.builder.info.features
    height, width, channels = features[found.image_key].shape
    if channels not in (1, 3):
        raise UserError(f"the images of {wanted} have {channels} channels; they must have 1 or 3")
    labels = features[found.label_key]
    return DatasetInfo(
        name,
        num_classes=labels.num_classes,
        image_size=height or 224,
        channels=channels,
        normalisation=IMAGENET if channels == 3 else Normalisation((0.5,), (0.5,)),
        flip=True,
        class_names=tuple(labels.names),
        resize_ratio=1.0 if height and height == width else 256 / 224,
        imagenet_indices=imagenet_positions(labels.names),
        tfds_name=wanted,
    )


class Found(NamedTuple):
    """A prepared set: its folder, its builder, and the names of its image and its label."""

    folder: epath.Path
    builder: Any
    image_key: str
    label_key: str


def find(info: DatasetInfo, path: str | None) -> Found:
    """The prepared set of a data set, below a data_dir or in the folder itself.

    Of several versions the newest that can be read is taken. A set of our table may be there in
    another configuration, which is warned of.

    Raises:
      UserError: there is none, or none of the configuration that is named, or only one that cannot
        be read at random, or several kinds.
    """
    if info.tfds_name is None:
        raise UserError(f"{info.name} is not in TensorFlow Datasets; choose another dataset.source")
    told = expected(info, path)
    path = existing(path, told, lambda p: epath.Path(p).is_dir())
    name, _, config = info.tfds_name.partition("/")
    folders = prepared_folders(path)
    if not folders:
        raise UserError(f"{path} has no {INFO}, so nothing is prepared there; {told}")
    of_builder = {f: meta for f, meta in folders.items() if meta.get("name") == name}
    if not of_builder:
        there = ", ".join(sorted({str(meta.get("name")) for meta in folders.values()}))
        raise UserError(f"{path} holds {there}, not {name}; {told}")
    of_config = {f: m for f, m in of_builder.items() if kind(m) == config}
    if config and not of_config:
        kinds = sorted({"/".join(filter(None, (name, kind(m)))) for m in of_builder.values()})
        holds = f"{path} holds {', '.join(kinds)}, not {info.tfds_name}"
        if info.name not in DATASETS:
            raise UserError(f"{holds}; set dataset.name to {TFDS}{kinds[0]} to read that; {told}")
        # The same images, stored at another size.
        warnings.warn(f"{holds}; it is read as {info.name}", stacklevel=2)
    readable = {f: m for f, m in (of_config or of_builder).items() if ARRAY_RECORD in formats(m)}
    if not readable:
        folder = newest(of_config or of_builder)
        raise UserError(
            f"{folder} is stored as {formats(of_builder[folder])[0]}, which cannot be read at "
            f"random. Convert it once (it is only read):\n    "
            + command(info, f"--from={folder}", "--to=<data_dir for the result>")
            + "\nand set dataset.path to that data_dir"
        )
    configs = sorted({kind(meta) for meta in readable.values()})
    if len(configs) > 1:
        raise UserError(
            f"{path} holds {name} in several kinds ({', '.join(configs)}); set dataset.path to the "
            f"folder of one of them, such as {newest(readable)}"
        )
    return _open(newest(readable))


def prepared_folders(path: epath.PathLike) -> dict[epath.Path, dict[str, Any]]:
    """The folders with a prepared set at most three levels below, and what each says of itself."""
    root = epath.Path(glob.escape(os.fspath(path)))  # its own name is no pattern
    found = {}
    for pattern in (INFO, f"*/{INFO}", f"*/*/{INFO}", f"*/*/*/{INFO}"):
        for file in root.glob(pattern):
            try:
                found[file.parent] = json.loads(file.read_text())
            except ValueError as error:
                raise UserError(f"{file} is damaged ({error}); prepare the set again") from error
    return found


def formats(meta: dict[str, Any]) -> list[str]:
    """The formats in which a prepared set is stored; old ones do not say, and are TFRecord."""
    return [meta.get("fileFormat") or TFRECORD, *meta.get("alternativeFileFormats", ())]


def kind(meta: dict[str, Any]) -> str:
    """The configuration in which a set is prepared, "" where its builder has none."""
    return meta.get("configName", "")


def command(info: DatasetInfo, *arguments: str) -> str:
    """The command that converts or prepares a set."""
    words = ["python -m prism_jax.tools.prepare", f"--dataset={info.tfds_name}", *arguments]
    return " ".join(words)


def expected(info: DatasetInfo, path: str | None) -> str:
    """What belongs at dataset.path, and how it gets there."""
    assert info.tfds_name is not None
    name = info.tfds_name.partition("/")[0]
    to = f"--to={path or '<dataset.path>'}"
    lines = [
        f"dataset.source=tfds needs dataset.path to be a data_dir of TensorFlow Datasets that "
        f"holds {name} as {ARRAY_RECORD}, or the folder of its {INFO}. Where it is prepared as "
        f"{TFRECORD}, convert it once:\n    {command(info, '--from=<its data_dir>', to)}"
    ]
    if name == "imagenet2012":
        lines.append(
            "Otherwise download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from "
            "image-net.org (it asks you to register) into one folder, and prepare them once:\n    "
            "pip install 'prism-jax[prepare]'\n    "
            + command(info, to, "--downloads=<that folder>")
        )
    else:
        lines.append(
            "Otherwise download and prepare it once:\n"
            f"    pip install 'prism-jax[prepare]'\n    {command(info, to)}"
        )
    if own := OWN_FILES.get(info.name):
        lines.append(f"Or read its published files: {own}")
    return "\n".join(lines)


OWN_FILES = {
    "mnist": "dataset.source=idx",
    "fashion_mnist": "dataset.source=idx",
    "cifar10": "dataset.source=cifar",
    "cifar100": "dataset.source=cifar",
    "imagenet": "dataset.source=folder",
    "imagenette": "dataset.source=folder",
}


def newest(folders: Iterable[epath.Path]) -> epath.Path:
    """The folder of the highest version."""

    def version(folder: epath.Path) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall("[0-9]+", folder.name))

    return max(sorted(folders), key=version)


def _open(folder: epath.Path) -> Found:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS raises many kinds for metadata it cannot use
        raise UserError(
            f"{folder} cannot be opened by TensorFlow Datasets {tfds.__version__} "
            f"({str(error).splitlines()[0]}); prepare the set again"
        ) from error
    features = builder.info.features

    def only(kind: type, supervised: str | None) -> str:
        keys = [key for key, feature in features.items() if type(feature) is kind]
        if supervised is not None and supervised in keys:
            return supervised
        if len(keys) != 1:
            raise UserError(
                f"{builder.info.name} has {len(keys)} features of the kind {kind.__name__} "
                f"({', '.join(keys)}); a set for image classification has one of each, Image and "
                f"ClassLabel, or names them as its supervised keys"
            )
        return keys[0]

    image, label = (builder.info.supervised_keys or (None, None))[:2]
    return Found(
        folder,
        builder,
        only(tfds.features.Image, image),
        only(tfds.features.ClassLabel, label),
    )


def _feature(records: Any, index: int, key: str) -> Any:
    """One feature of a serialised ``tf.train.Example``.

    Raises:
      ValueError, RuntimeError, IndexError, OSError: the record is damaged.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        return tf_example_pb2.Example.FromString(records[index]).features.feature[key]
    except DecodeError as error:
        raise ValueError(error) from error


def _read_labels(records: Any, key: str, *, title: str) -> np.ndarray:
    """The label of every record; each has to be read whole, as its image lies beside it."""

    def label(index: int) -> int:
        try:
            return _feature(records, index, key).int64_list.value[0]
        except (RuntimeError, ValueError, IndexError, OSError):
            return UNREADABLE_LABEL

    def part(start: int) -> list[int]:
        return [label(i) for i in range(start, min(start + _AT_ONCE, len(records)))]

    labels: list[int] = []
    with ThreadPoolExecutor(8) as pool, progress.task(title, len(records), unit="image") as bar:
        for some in pool.map(part, range(0, len(records), _AT_ONCE)):
            labels += some
            bar.advance(len(some))
    return np.array(labels, np.int64)
