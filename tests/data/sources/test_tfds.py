from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.images import encoded, random_pixels
from helpers.prepared import prepare

from prism_jax.data.datasets import DATASETS
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import info_of, open_source, read_all
from prism_jax.data.sources import tfds as tfds_source
from prism_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    prepare(root)
    return root


def opened(path, split="train", name="cifar10", **options):
    return open_source(name=name, source="tfds", path=path, split=split, image_size=32, **options)


def test_images_and_labels(data_dir):
    for path in (data_dir, data_dir / "cifar10", data_dir / "cifar10" / "3.0.2"):
        source = opened(path)
        images, labels = read_all(source)
        assert len(source) == 12 and labels.dtype == np.int32 and source.num_classes == 10
        # Preparing shuffles the records: match images and labels by content.
        by_content = {random_pixels(32, 32, 3, seed=i).tobytes(): i % 10 for i in range(12)}
        assert [by_content[image.tobytes()] for image in images] == labels.tolist()
    test = opened(data_dir, "test")
    assert len(test) == 4
    assert test.describe() != source.describe()
    json.dumps(source.describe())


def test_identity_is_the_same_in_another_place_and_sees_labels(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "copy")
    assert opened(tmp_path / "copy").describe() == opened(data_dir).describe()
    prepare(tmp_path / "other", classes=9)  # the same bytes but for two labels
    assert opened(tmp_path / "other").describe() != opened(data_dir).describe()


def test_labels_are_read_once_and_kept_while_the_files_are_the_same(
    data_dir, tmp_path, monkeypatch
):
    passes = []
    read = tfds_source._read_labels
    monkeypatch.setattr(
        tfds_source, "_read_labels", lambda *a, **k: passes.append(1) or read(*a, **k)
    )
    first, again = opened(data_dir).labels_N, opened(data_dir).labels_N
    np.testing.assert_array_equal(first, again)
    assert len(passes) == 1
    shutil.copytree(data_dir, tmp_path / "copy")
    np.testing.assert_array_equal(opened(tmp_path / "copy").labels_N, first)
    assert len(passes) == 2


@pytest.mark.parametrize("around", ["[0:2]", "a*b?", "größe 数据"])
def test_any_name_of_a_data_dir(tmp_path, data_dir, around):
    shutil.copytree(data_dir, tmp_path / around)
    assert opened(tmp_path / around).describe() == opened(data_dir).describe()
    assert read_all(opened(tmp_path / around))[0].shape == (12, 32, 32, 3)


def test_the_newest_version_is_taken_and_another_builder_is_refused(tmp_path):
    prepare(tmp_path, version="3.0.2"), prepare(tmp_path, version="3.0.10")
    assert opened(tmp_path).describe()["name"] == "cifar10/3.0.10"
    with pytest.raises(UserError, match="holds cifar10, not cifar100"):
        opened(tmp_path, name="cifar100")


def prepare_kind(root, builder, kind, **options):
    """A set prepared in one of its configurations, as it says of itself."""
    folder = prepare(root / kind, builder, "1.0.0", **options)
    info = folder / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"configName": kind}))


def test_another_configuration_than_the_one_named_is_refused(tmp_path):
    prepare_kind(tmp_path, "Cmaterdb", "bangla")
    prepare_kind(tmp_path, "Cmaterdb", "telugu", classes=8)
    for kind, classes in (("bangla", 10), ("telugu", 8)):
        assert info_of(f"tfds:cmaterdb/{kind}", tmp_path).num_classes == classes
    said = (
        r"holds cmaterdb/bangla, cmaterdb/telugu, not cmaterdb/devanagari; set dataset.name to "
        r"tfds:cmaterdb/bangla (.|\n)*prepare --dataset=cmaterdb/devanagari"
    )
    for path in (tmp_path, tmp_path / "bangla"):
        with pytest.raises(UserError, match=said if path == tmp_path else "not cmaterdb/devan"):
            info_of("tfds:cmaterdb/devanagari", path)
    assert info_of("tfds:cmaterdb", tmp_path / "telugu").num_classes == 8  # nothing is named
    with pytest.raises(UserError, match="in several kinds"):
        info_of("tfds:cmaterdb", tmp_path)


def test_a_set_of_the_table_may_be_there_at_another_size(tmp_path):
    prepare_kind(tmp_path, "Imagenette", "160px-v2")
    with pytest.warns(UserWarning, match="holds imagenette/160px-v2, not imagenette/320px-v2;"):
        assert len(opened(tmp_path, name="imagenette", split="train")) == 12


def test_any_builder_says_what_it_is(tmp_path):
    prepare(tmp_path, "MyFlowers", "1.0.0", classes=7)
    info = info_of("tfds:my_flowers", tmp_path)
    assert (info.num_classes, info.channels, info.image_size) == (7, 3, 32)
    assert info.normalisation.mean == (0.485, 0.456, 0.406)
    source = opened(tmp_path, name="tfds:my_flowers")
    assert source.num_classes == 7 and source.labels_N.max() == 6
    assert opened(tmp_path, "test", name="tfds:my_flowers").describe()["split"] == "test"
    with pytest.raises(UserError, match="prepare --dataset=other --to="):
        info_of("tfds:other", tmp_path / "nowhere")


def test_a_second_label_is_no_obstacle_and_other_features_are_not_decoded(tmp_path):
    coarse = {"coarse": tfds.features.ClassLabel(num_classes=20)}
    prepare(tmp_path, extra=coarse)
    assert sorted(set(opened(tmp_path).labels_N)) == list(range(10))


def test_missing_splits_and_files_are_named(tmp_path):
    folder = prepare(tmp_path, "Eurosat", "2.0.0", counts={"train": 3})
    with pytest.raises(UserError, match="no split test or val or validation, only train"):
        opened(tmp_path, "test", name="tfds:eurosat")
    next(folder.glob("*train*")).unlink()
    with pytest.raises(UserError, match="train.array_record-00000-of-00001 is missing"):
        opened(tmp_path, name="tfds:eurosat")
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="dataset_info.json is damaged"):
        opened(tmp_path, name="tfds:eurosat")


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_damaged_records_are_named_or_left_out(tmp_path, how):
    folder = prepare(tmp_path)
    images = read_all(opened(tmp_path))[0]
    (path,) = folder.glob("*train*")
    data = bytearray(path.read_bytes())
    png = encoded(images[5])
    at = bytes(data).find(png[40:60])
    assert at > 0, "records are stored as they are"
    data[at] ^= 1
    path.write_bytes(bytes(data))
    if how == "stop":
        with pytest.raises(DamagedFile, match="train record 5 cannot be read"):
            _ = opened(tmp_path).labels_N
    else:
        source = opened(tmp_path, damaged="skip")
        assert len(source) == 11 and source.left_out == 1
        np.testing.assert_array_equal(read_all(source)[0], np.delete(images, 5, axis=0))


def test_a_set_stored_as_tfrecord_is_answered_with_the_command(tmp_path):
    folder = prepare(tmp_path, "Imagenet2012", "5.1.0")
    meta = json.loads((folder / "dataset_info.json").read_text())
    for old in (
        meta | {"fileFormat": "tfrecord"},
        {k: v for k, v in meta.items() if k != "fileFormat"},
    ):
        (folder / "dataset_info.json").write_text(json.dumps(old))
        wanted = (
            f"is stored as tfrecord.*\n    python -m prism_jax.tools.prepare "
            f"--dataset=imagenet2012 --from={folder} --to="
        )
        with pytest.raises(UserError, match=wanted):
            opened(tmp_path, name="imagenet")


def test_what_is_missing_is_told_exactly(tmp_path):
    with pytest.raises(UserError) as error:
        opened(tmp_path, name="imagenet")
    for words in (
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
        "image-net.org",
        f"prepare --dataset=imagenet2012 --to={tmp_path} --downloads=<that folder>",
        "pip install 'prism-jax[prepare]'",
        "dataset.source=folder",
    ):
        assert words in str(error.value)
    with pytest.raises(
        UserError, match=f"prepare --dataset=cifar10 --to={tmp_path}\n.*source=cifar"
    ):
        opened(tmp_path)
    with pytest.raises(UserError, match="not in TensorFlow Datasets"):
        opened(tmp_path, name="digits")


def test_every_data_set_has_a_source():
    for info in DATASETS.values():
        assert info.tfds_name or info.name in ("digits", "tiny_imagenet")


def test_tensorflow_is_never_imported_even_where_it_is_installed(data_dir, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise AssertionError('imported')")
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from prism_jax.data import pipeline, sources\n"
        f"source = sources.open_source(name='cifar10', source='tfds', path={str(data_dir)!r},"
        " split='train', image_size=32)\n"
        "batch = next(pipeline.batches(source, batch_size=4, epochs=1, seed=0, name='x'))\n"
        "assert batch.images_BHWC.shape == (4, 32, 32, 3) and source.describe()\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    twin = code + "import tensorflow\n"
    assert subprocess.run([sys.executable, "-c", twin], stderr=subprocess.DEVNULL).returncode
