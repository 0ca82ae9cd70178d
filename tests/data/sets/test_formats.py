"""One set of pixels in every format in which people publish sets: the same images and labels."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from prism_jax.data.datasets import DATASETS
from prism_jax.data.exchange import ImageSet
from prism_jax.data.sets import table, torch_file
from prism_jax.data.sets.base import NOTHING_STATED, Stated
from prism_jax.data.sources import ArraySource, read_all
from prism_jax.errors import UserError

CLASSES, IPC, SIZE = ("b_cat", "c_dog", "a_bird"), 2, 8  # not in the order of the alphabet
LABELS = np.repeat(np.arange(3), IPC)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), np.uint8)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FLOATS = ((PIXELS / np.float32(255) - np.float32(MEAN)) / np.float32(STD)).astype(np.float32)
FLOATS = FLOATS.transpose(0, 3, 1, 2)
STATED = Stated(MEAN, STD)
WEIGHTS = np.array([1, 2, 3, 0, 4, 2], np.float32)
SHUFFLED = np.array([4, 0, 5, 2, 1, 3])  # an order of rows that keeps the order in each class


def opened(
    path, *, stated=NOTHING_STATED, ipc=IPC, names=CLASSES, size=SIZE, name="imagenet", **more
):
    real = ArraySource(np.zeros((3, SIZE, SIZE, 3), np.uint8), np.arange(3), num_classes=3)
    real.class_names = names
    return ImageSet(path, DATASETS[name], real, ipc=ipc, image_size=SIZE, stated=stated)


def assert_same(path, **arguments) -> ImageSet:
    found = opened(path, **arguments)
    images, labels = read_all(found, threads=2)
    np.testing.assert_array_equal(images, PIXELS)
    assert labels.tolist() == LABELS.tolist()
    return found


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root=""):
    """Path and bytes of each image in class folders."""
    return {
        f"{root}{CLASSES[label]}/{slot % IPC}.png": png(image)
        for slot, (label, image) in enumerate(zip(LABELS, PIXELS, strict=True))
    }


def write_tree(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# --- folders and archives ---------------------------------------------------------------------


@pytest.mark.parametrize("around", ["", "set/", "train/", "a/b/"])
def test_a_folder_whatever_is_around_it(tmp_path, around):
    write_tree(tmp_path, tree(around))
    (tmp_path / "README.md").write_text("")
    if around == "train/":
        write_tree(tmp_path, {"test/a_bird/9.png": png(PIXELS[0])})
    write_tree(tmp_path, {f"{around}grid.png": png(PIXELS[0])})  # for people to look at
    assert_same(tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("around", ["", "./", "set/train/"])
def test_a_tar_file(tmp_path, around, mode):
    path = tmp_path / ("set.tar" if mode == "w" else "set.tar.gz")
    with tarfile.open(path, mode) as tar:
        more = {f"{around}.hidden/0.png": b"", f"{around}grid.png": png(PIXELS[0])}
        for name, data in {**tree(around), **more}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    assert_same(path)


@pytest.mark.parametrize("kind", ["", ".zip", ".tar", ".tar.gz"])
def test_what_is_no_image_is_named_and_counted(tmp_path, capsys, kind):
    path, others = tmp_path / f"set{kind}", {"a.txt": b"", ".DS_Store": b"", "Thumbs.db": b"x"}
    files = {**tree(), **{f"{CLASSES[0]}/{name}": data for name, data in others.items()}}
    files["c_dog/1"] = files.pop("c_dog/1.png")  # told by its first bytes
    files["stray.png"], files["README.md"] = png(PIXELS[0]), b"the format's own"
    if not kind:
        write_tree(path, files)
        (path / CLASSES[1] / "self").symlink_to(".")
    elif kind == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as tar:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    found = assert_same(path)
    said = capsys.readouterr().out
    assert found.left_out == 4 + (not kind)
    assert "1 x in no class folder: stray.png" in said and "README" not in said
    assert all(name in said for name in others)


def test_links_in_a_tar_file_are_followed(tmp_path):
    files = tree("set/")
    kinds = {"set/b_cat/1.png": tarfile.LNKTYPE, "set/c_dog/1.png": tarfile.SYMTYPE}
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            if name in kinds:
                where = tarfile.TarInfo(f"set/hidden/{name[4]}.dat")
                where.size = len(data)
                tar.addfile(where, io.BytesIO(data))
                entry.type = kinds[name]
                link = (
                    f"./{where.name}"
                    if entry.type == tarfile.LNKTYPE
                    else f"../hidden/{name[4]}.dat"
                )
                entry.linkname = link
                tar.addfile(entry)
            else:
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    assert_same(tmp_path / "set.tar")
    whole = (tmp_path / "set.tar").read_bytes()
    (tmp_path / "set.tar").write_bytes(whole[: len(whole) // 1024 * 512])
    with pytest.raises(UserError, match="set.tar is cut short or damaged at byte"):
        opened(tmp_path / "set.tar")
    with tarfile.open(tmp_path / "lost.tar", "w") as tar:
        entry = tarfile.TarInfo("a/0.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "../../elsewhere.png"
        tar.addfile(entry)
    with pytest.raises(UserError, match="a/0.png is a link to ../../elsewhere.png, outside"):
        opened(tmp_path / "lost.tar")


def test_a_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**tree("set/"), "__MACOSX/set/b_cat/._0.png": b""}.items():
            archive.writestr(name, data)
    assert_same(tmp_path / "set.zip")
    (tmp_path / "set").write_bytes((tmp_path / "set.zip").read_bytes())  # as in a cache
    assert_same(tmp_path / "set")
    for cut in (-40, 40):
        (tmp_path / "set.zip").write_bytes((tmp_path / "set").read_bytes()[:cut])
        with pytest.raises(UserError, match=r"set.zip is not a whole tar or zip file \(File is"):
            opened(tmp_path / "set.zip")


def test_a_damaged_compressed_tar_file_is_named(tmp_path):
    path = tmp_path / "set.tar.xz"
    noise = np.random.default_rng(0).bytes(1 << 18)  # more than is read at once
    with tarfile.open(path, "w:xz") as tar:
        for name, data in {**tree(), "README.md": noise}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    whole = assert_same(path) and path.read_bytes()
    path.write_bytes(whole[:-100_000] + bytes(100_000))
    with pytest.raises(UserError, match="set.tar.xz is not a whole tar or zip file"):
        opened(path)


# --- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("named", [True, False])
def test_images_with_a_table(tmp_path, kind, named):
    rows = [
        {
            "file_name": f"images/{i}.png",
            "label": CLASSES[LABELS[i]] if named else int(LABELS[i]),
            "weight": float(WEIGHTS[i]),
        }
        for i in SHUFFLED
    ]
    write_tree(tmp_path / "train", {f"images/{i}.png": png(x) for i, x in enumerate(PIXELS)})
    table = tmp_path / "train" / f"metadata.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        table.write_text("\n".join(map(json.dumps, rows)))
    found = assert_same(tmp_path)
    np.testing.assert_allclose(found.weights_N, WEIGHTS / WEIGHTS.mean())
    assert opened(tmp_path).describe() == found.describe()
    rows[0]["weight"] += 1
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
        assert opened(tmp_path).describe() != found.describe()


def test_numbers_that_a_table_writes_as_fractions_are_numbers(tmp_path):
    """As pandas does with a column that lacked one: class 10.0 came before 2.0."""
    for i in range(12):
        write_tree(tmp_path, {f"{i}.png": png(np.full((SIZE, SIZE, 3), i, np.uint8))})
    rows = [f"{i}.png,{i}.0" for i in range(12)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    real = ArraySource(np.zeros((12, SIZE, SIZE, 3), np.uint8), np.arange(12), num_classes=12)
    found = ImageSet(tmp_path, DATASETS["imagenet"], real, ipc=1, image_size=SIZE)
    assert [int(found.image(i)[0, 0, 0]) for i in range(12)] == list(range(12))


def test_names_that_look_like_fractions_stay_names():
    labels = ["1.0", "1.5", "2.0"]
    assert table._numbers(labels) == labels
    assert table._numbers(["1.0", "2.0", 3]) == [1, 2, 3]
    assert table._numbers(["01", "2"]) == ["01", 2]


def test_a_table_that_names_a_file_that_is_not_there(tmp_path):
    write_tree(tmp_path, tree())
    rows = [{"file_name": name, "label": name.split("/")[0]} for name in tree()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert_same(tmp_path).describe()
    (tmp_path / "c_dog" / "1.png").unlink()
    with pytest.raises(UserError, match="c_dog/1.png cannot be read .*whole copy of the set"):
        opened(tmp_path).describe()


def test_a_table_that_leads_elsewhere_or_says_nothing(tmp_path):
    write_tree(tmp_path, tree())
    table = tmp_path / "metadata.jsonl"
    table.write_text(json.dumps({"file_name": "b_cat/0.png", "text": "a caption"}))
    assert_same(tmp_path)  # it is about something else; the folders say the labels
    (tmp_path / "c_dog").rename(tmp_path / "b_cat" / "inside")
    with pytest.raises(
        UserError, match=r"2 class folders \(its metadata.jsonl has no column label"
    ):
        opened(tmp_path)
    (tmp_path / "b_cat" / "inside").rename(tmp_path / "c_dog")
    table.write_text(json.dumps({"file_name": "../x.png", "label": 0}))
    with pytest.raises(UserError, match="names ../x.png, which is not inside the folder"):
        opened(tmp_path)
    table.write_text('{"file_name": ')
    with pytest.raises(UserError, match="metadata.jsonl is no table of images"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("where", ["", "train/"])
@pytest.mark.parametrize(
    "content",
    [
        b"label,count\n0,5000\n1,5000\n",
        b'{"label": 0, "count": 5000}\n[1, 2]\n"text"\n',
        b"Stra\xdfe;label\n",
        b"",
        b"\0\0\0",
        b'{"label": ',
    ],
)
def test_a_table_of_something_else_leaves_the_folders_readable(tmp_path, where, name, content):
    write_tree(tmp_path, tree(where))
    (tmp_path / where / name).write_bytes(content)
    assert_same(tmp_path)
    images, _ = read_all(assert_same(tmp_path), threads=1)
    # Twin: the same images without their folders are no set.
    alone = tmp_path / "alone"
    write_tree(alone, {f"{where}{i}.png": png(x) for i, x in enumerate(images)})
    (alone / where / name).write_bytes(content)
    with pytest.raises(UserError):
        opened(alone)


@pytest.mark.parametrize("row", ['{"label": 0}', '"b_cat"', "{"])
def test_a_table_that_is_damaged_in_a_row_is_refused(tmp_path, row):
    write_tree(tmp_path, tree())
    rows = [json.dumps({"file_name": name, "label": name.split("/")[0]}) for name in tree()]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*rows, row]))
    with pytest.raises(UserError, match="metadata.jsonl is no table of images"):
        opened(tmp_path)


def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path):
    write_tree(tmp_path, tree())
    rows = [
        {"file_name": name, "label": name.split("/")[0], "text": "a\u2028b\u0085c"}
        for name in tree()
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    assert_same(tmp_path)


def test_an_image_that_tables_name_twice_is_refused(tmp_path):
    """A table in both forms would fill a set with the same images twice."""
    write_tree(tmp_path, tree())
    rows = [{"file_name": f"b_cat/{i}.png", "label": 0} for i in range(2)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_text(text)
    (tmp_path / "metadata.csv").write_text("file_name,label\nb_cat/0.png,0\nb_cat/1.png,0\n")
    with pytest.raises(UserError, match="b_cat/0.png more than once; leave one table"):
        opened(tmp_path)


# --- parquet ----------------------------------------------------------------------------------


def write_parquet(path, rows, *, label, names=None, as_path=None, plain=False, **columns):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    images = [
        png(PIXELS[i]) if plain
        else {"bytes": None if as_path else png(PIXELS[i]), "path": as_path and as_path(i)}
        for i in rows
    ]  # fmt: skip
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": label, **columns})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        said = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": said})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def test_parquet_with_names_in_another_order(tmp_path):
    """The numbers are positions in the schema's names, which are not in our order."""
    names = sorted(CLASSES)
    label = [names.index(CLASSES[LABELS[i]]) for i in SHUFFLED]
    assert label != [LABELS[i] for i in SHUFFLED]
    write_parquet(tmp_path / "set.parquet", SHUFFLED, label=label, names=names)
    assert_same(tmp_path / "set.parquet")
    write_parquet(tmp_path / "bare.parquet", SHUFFLED, label=label)  # the twin, without names
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "bare.parquet")


@pytest.mark.parametrize("plain", [True, False])
def test_parquet_shards_of_text_labels(tmp_path, plain):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")

    def as_text(labels):
        return pa.array(labels).dictionary_encode() if plain else labels

    for shard, rows in enumerate((SHUFFLED[:2], SHUFFLED[2:5], SHUFFLED[5:])):
        write_parquet(
            tmp_path / "data" / f"train-{shard:05d}-of-00003.parquet", rows,
            label=as_text([CLASSES[LABELS[i]] for i in rows]), plain=plain, weight=WEIGHTS[rows],
        )  # fmt: skip
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [0], label=["other"])
    found = assert_same(tmp_path)
    np.testing.assert_allclose(found.weights_N, WEIGHTS / WEIGHTS.mean())
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="train-00001-of-00003.parquet is missing"):
        opened(tmp_path)


def test_what_datasets_saves_to_disk(tmp_path):
    """Arrow files named by state.json, of one set or of its splits; by hand, and by the library."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    for shard, rows in enumerate((SHUFFLED[:4], SHUFFLED[4:])):
        write_parquet(tmp_path / "x.parquet", rows, label=LABELS[rows], names=list(CLASSES))
        table = pq.read_table(tmp_path / "x.parquet")
        path = tmp_path / "set" / "train" / f"data-{shard:05d}-of-00002.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    names = [{"filename": f"data-{shard:05d}-of-00002.arrow"} for shard in range(2)]
    (path.parent / "state.json").write_text(json.dumps({"_data_files": names}))
    assert_same(tmp_path / "set" / "train")
    assert_same(tmp_path / "set")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as Arrow"):
        opened(tmp_path / "set")
    path.unlink()
    with pytest.raises(UserError, match="cannot be read as Arrow .*data-00001-of-00002.arrow"):
        opened(tmp_path / "set")

    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    write_parquet(tmp_path / "x.parquet", SHUFFLED, label=LABELS[SHUFFLED], names=list(CLASSES))
    whole = datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=tmp_path / "cache")
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "saved")
    assert_same(tmp_path / "saved")


def test_parquet_with_paths(tmp_path):
    write_tree(tmp_path, {f"images/{i}.png": png(x) for i, x in enumerate(PIXELS)})
    write_parquet(
        tmp_path / "set.parquet", range(6), label=LABELS, as_path=lambda i: f"images/{i}.png"
    )
    assert_same(tmp_path / "set.parquet")
    (tmp_path / "images" / "3.png").unlink()
    for read in (lambda found: found.image(3), lambda found: found.describe()):
        with pytest.raises(UserError, match="row 3 cannot be read .*whole copy of the set"):
            read(opened(tmp_path / "set.parquet"))


def test_parquet_without_rows_and_of_arrays(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "none.parquet", [], label=pa.array([], pa.int64()), names=["a", "b"])
    with pytest.raises(UserError, match="none.parquet has no rows"):
        opened(tmp_path / "none.parquet")
    table = pa.table({"image": PIXELS.tolist(), "label": LABELS})  # as datasets' Array3D
    pq.write_table(table, tmp_path / "arrays.parquet")
    found = opened(tmp_path / "arrays.parquet")
    for read in (lambda: found.image(3), found.describe):
        with pytest.raises(UserError, match=r"row \d cannot be read \(its image is a list, not"):
            read()


def test_parquet_is_written_in_groups_that_can_be_read_back(tmp_path, monkeypatch):
    """All in one, a set of more than 2 GiB could not."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    from prism_jax.data.sets import parquet
    from prism_jax.data.sets.content import Content

    monkeypatch.setattr(parquet, "card", lambda *_, **__: "")
    classes = [{"folder": name, "index": i, "name": name} for i, name in enumerate(CLASSES)]
    pixels = np.random.default_rng(1).integers(0, 256, (210, SIZE, SIZE, 3), np.uint8)
    labels = np.repeat(np.arange(3, dtype=np.int32), 70)
    soft = np.eye(3, dtype=np.float32)[labels]
    parquet.write(
        str(tmp_path), Content(pixels, labels, classes, 70, soft, soft[:, 0] + 1, None, None, {})
    )
    (file,) = (tmp_path / "data").iterdir()
    written = pq.ParquetFile(file).metadata
    rows = [written.row_group(i).num_rows for i in range(written.num_row_groups)]
    assert rows == [100, 100, 10]
    found = opened(tmp_path, ipc=70)
    np.testing.assert_array_equal(read_all(found, threads=2)[0], pixels)
    assert found.labels_N.tolist() == labels.tolist()


def test_parquet_of_another_split_is_not_read(tmp_path):
    """Wherever in its name the word stands; two sets in one folder are asked about."""
    write_parquet(tmp_path / "mnist_train.parquet", SHUFFLED, label=LABELS[SHUFFLED],
                  names=list(CLASSES))  # fmt: skip
    write_parquet(tmp_path / "mnist_test.parquet", [0], label=[1], names=list(CLASSES))
    assert_same(tmp_path)
    (tmp_path / "mnist_train.parquet").rename(tmp_path / "a.parquet")
    assert_same(tmp_path)
    (tmp_path / "mnist_test.parquet").rename(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"several sets \(a, b\); name the file of one"):
        opened(tmp_path)
    assert_same(tmp_path / "a.parquet")


def test_parquet_of_other_things(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "set.parquet")
    with pytest.raises(UserError, match="the columns text, and none that is called image or img"):
        opened(tmp_path)
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        opened(tmp_path)


# --- tensors and arrays -----------------------------------------------------------------------


def write_tensors(folder, **tensors):
    folder.mkdir(exist_ok=True)
    for name, tensor in tensors.items():
        torch_file.save(folder / f"{name}.pt", tensor)
    return folder


def test_dd_rankings_files(tmp_path):
    write_tensors(tmp_path, images=FLOATS, labels=LABELS, lr=np.array(0.01, np.float32))
    assert any("a rate of 0.01" in note for note in assert_same(tmp_path, stated=STATED).notes)
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    for flag in ("initialise_mean", "initialise_std", "initialise_whitening=zca"):
        assert flag in str(caught.value)
    with pytest.warns(UserWarning, match="darker than black or lighter than white"):
        read = opened(tmp_path, stated=Stated((0.0,) * 3, (1.0,) * 3))
    assert (read.image(0) != PIXELS[0]).any()  # the twin: another space


def test_a_config_beside_them_says_the_space(tmp_path):
    pytest.importorskip("yaml", reason="pyyaml is not installed")
    write_tensors(tmp_path, images=FLOATS, labels=LABELS)
    steps = f"  - name: Normalize\n    args:\n      mean: {list(MEAN)}\n      std: {list(STD)}\n"
    (tmp_path / "config.yaml").write_text(f"use_zca: false\ncustom_val_trans:\n{steps}")
    assert_same(tmp_path)


ROUNDED = {
    "three decimals": lambda odds: np.round(odds, 3),
    "bfloat16": lambda odds: odds.astype(ml_dtypes.bfloat16).astype(np.float32),
    "the largest two": lambda odds: np.where(odds >= np.sort(odds, 1)[:, -2:-1], odds, 0),
}


@pytest.mark.parametrize("how", ROUNDED)
def test_probabilities_that_are_rounded_are_no_logits(tmp_path, how):
    """Read as logits they would be nearly uniform."""
    soft = 2 * np.random.default_rng(1).normal(size=(6, 3))
    soft[np.arange(6), LABELS] += 3
    odds = np.exp(soft) / np.exp(soft).sum(1, keepdims=True)
    given = ROUNDED[how](odds.astype(np.float32))
    assert np.abs(given.sum(1) - 1).max() > 1e-4
    write_tensors(tmp_path, images=PIXELS, labels=given)
    logits = assert_same(tmp_path).soft_NK.astype(np.float64)
    back = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(back, given / given.sum(1, keepdims=True), atol=1e-6)
    uniform = np.exp(given) / np.exp(given).sum(1, keepdims=True)
    assert np.abs(uniform - back).max() > 0.2  # the twin


def test_numbers_that_are_neither_probabilities_nor_logits_are_refused(tmp_path):
    given = np.full((6, 3), 0.1, np.float32)
    write_tensors(tmp_path, images=PIXELS, labels=given)
    with pytest.raises(UserError, match="from 0 to 1, as probabilities are, and a row sums to 0.3"):
        opened(tmp_path)


@pytest.mark.parametrize("probabilities", [True, False])
def test_one_soft_label_per_image(tmp_path, probabilities):
    soft = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    soft[np.arange(6), LABELS] += 4
    odds = np.exp(soft) / np.exp(soft).sum(1, keepdims=True)
    write_tensors(tmp_path, images=PIXELS, labels=odds if probabilities else soft)
    found = assert_same(tmp_path)
    logits = found.soft_NK.astype(np.float64)
    back = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(back, odds, rtol=1e-5)


def test_soft_labels_say_the_classes_of_images_in_another_order(tmp_path):
    """They were taken class after class, whatever the labels said."""
    soft = np.full((6, 3), 0.05) + 0.85 * np.eye(3)[LABELS]
    turn = np.array([2, 4, 0, 3, 1, 5])  # no image in its place, but the last
    write_tensors(tmp_path, images=PIXELS[turn], labels=soft[turn])
    found = opened(tmp_path)
    assert any("do not stand class after class" in note for note in found.notes)
    shown, labels = read_all(found)
    at = [int(np.flatnonzero((PIXELS == x).all((1, 2, 3)))[0]) for x in shown]
    assert LABELS[at].tolist() == labels.tolist() == found.soft_NK.argmax(1).tolist()
    write_tensors(tmp_path, images=PIXELS, labels=soft[[2, 2, 5, 3, 1, 0]])
    with pytest.raises(UserError, match=r"which image .* is not known.* say of 17%.*Sort images"):
        opened(tmp_path)
    soft[0] = soft[5]  # the twin: one label of six is wrong, in place
    write_tensors(tmp_path, images=PIXELS, labels=soft)
    assert any("class after class, which the" in note for note in assert_same(tmp_path).notes)


def test_sets_of_mtt_and_datm(tmp_path):
    folder = write_tensors(tmp_path / "best", images_best=FLOATS, labels_best=LABELS)
    with pytest.raises(UserError, match="whitened where they were made with --zca"):
        opened(folder, stated=STATED)
    assert_same(folder, stated=STATED._replace(whitening="none"))
    write_tensors(tmp_path, images_5000=FLOATS, labels_5000=LABELS, images_zca_5000=FLOATS)
    assert_same(tmp_path / "images_5000.pt", stated=STATED._replace(whitening="none"))
    assert_same(tmp_path / "images_zca_5000.pt", stated=STATED)


def test_sets_of_dc(tmp_path):
    write_tensors(tmp_path, res={"data": [[FLOATS * 0, LABELS], [FLOATS, LABELS]], "accs": {}})
    assert_same(tmp_path / "res.pt", stated=STATED)


def test_tensors_without_labels_are_class_after_class(tmp_path):
    write_tensors(tmp_path, images=PIXELS)
    assert any("class after class" in note for note in assert_same(tmp_path).notes)
    write_tensors(tmp_path, images=PIXELS[:5])
    with pytest.raises(UserError, match="5 images and no labels beside it"):
        opened(tmp_path)


def test_labels_that_are_not_counted_from_zero(tmp_path):
    write_tensors(tmp_path, images=PIXELS, labels=LABELS + 1)
    assert_same(tmp_path)
    write_tensors(tmp_path, images=PIXELS, labels=2 * LABELS)
    with pytest.raises(UserError, match="numbers its 3 classes 0, 2, 4, neither 0 to 2 nor"):
        opened(tmp_path)


def test_npz(tmp_path):
    order = np.array([2, 0, 1])  # its own numbering, with names
    soft = np.eye(3, dtype=np.float32)[order[LABELS]] * 8
    names = np.array([CLASSES[1], CLASSES[2], CLASSES[0]])
    path = tmp_path / "set.npz"
    for stored in (np.char.encode(names, "utf-8"), names):  # in bytes, or as text
        np.savez(
            path, images=PIXELS, labels=order[LABELS], class_names=stored, soft_labels=soft,
            weights=WEIGHTS,
        )  # fmt: skip
        found = assert_same(path)
    assert found.soft_NK.argmax(1).tolist() == LABELS.tolist()  # its columns are ours
    np.testing.assert_allclose(found.weights_N, WEIGHTS / WEIGHTS.mean())
    np.savez(path, images=FLOATS, labels=LABELS[:, None])  # a column, as Keras has it
    assert_same(path, stated=STATED)
    assert_same(tmp_path, stated=STATED)  # the folder of an export
    write_tree(tmp_path, tree())  # of one with images beside it, which are taken
    path.write_bytes(b"")
    assert assert_same(tmp_path).describe()["split"] == "folder"
    np.savez(path, pictures=PIXELS)
    with pytest.raises(UserError, match="has no images and no labels; a set in .npz has"):
        opened(path)


@pytest.mark.parametrize("weights", [[1, 2], [1] * 5 + [-1], [0] * 6, [np.nan] * 6])
def test_weights_that_are_none(tmp_path, weights):
    np.savez(tmp_path / "set.npz", images=PIXELS, labels=LABELS, weights=np.array(weights, float))
    with pytest.raises(UserError, match="its weights must be one number per image"):
        opened(tmp_path / "set.npz")


# --- told by looking --------------------------------------------------------------------------


def test_several_sets_in_one_folder_are_refused(tmp_path):
    write_tree(tmp_path, tree())
    write_tensors(tmp_path, images=PIXELS, labels=LABELS)
    with pytest.raises(UserError, match=r"in several ways \(tensors, folder\); name the very file"):
        opened(tmp_path)
    assert_same(tmp_path / "images.pt")


def test_what_is_no_set(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="is no set that can be read; .*metadata.csv"):
            opened(path)


# --- names of classes beside them -------------------------------------------------------------

EXPORTED = [{"folder": f"{c:05d}", "index": c, "name": name} for c, name in enumerate(CLASSES)]
OTHER_ORDER = tuple(sorted(CLASSES))


def numbered_tree(root):
    return {
        f"{root}{LABELS[i]:05d}/{i % IPC:05d}.png": png(image) for i, image in enumerate(PIXELS)
    }


def write_kind(folder, kind, root):
    """A set with numbers for classes, in a way that ``tools.export`` writes."""
    if kind == "tensors":
        write_tensors(folder, images=PIXELS, labels=LABELS)
        return folder
    files = numbered_tree(root) | {"classes.json": json.dumps(EXPORTED).encode()}
    if kind == "zip":
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(f"set/{name}", data)
        return folder / "set.zip"
    write_tree(folder, files)
    if kind == "table":
        rows = [
            {"file_name": name.removeprefix(root), "label": int(label), "weight": 1.0}
            for name, label in zip(numbered_tree(root), LABELS, strict=True)
        ]
        (folder / root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(
    ("kind", "root"),
    [("tensors", ""), ("folder", ""), ("folder", "train/"), ("table", "train/"), ("zip", "train/")],
)
def test_classes_that_our_own_table_names_are_matched_by_name(tmp_path, kind, root):
    """The data may number them otherwise, as class folders do: by the alphabet."""
    path, table = write_kind(tmp_path, kind, root), tmp_path / "classes.json"
    table.write_text(json.dumps(EXPORTED))

    def names_of_images():
        real = ArraySource(np.zeros((3, SIZE, SIZE, 3), np.uint8), np.arange(3), num_classes=3)
        real.class_names = OTHER_ORDER
        found = ImageSet(path, DATASETS["imagenet"], real, ipc=IPC, image_size=SIZE)
        at = [int(np.flatnonzero((PIXELS == x).all((1, 2, 3)))[0]) for x in read_all(found)[0]]
        return [CLASSES[LABELS[i]] for i in at], [OTHER_ORDER[c] for c in found.labels_N]

    images, labels = names_of_images()
    assert images == labels
    if kind == "zip":
        return
    # Twins: tables of something else, which are passed over.
    swapped = [dict(row, index=2 - row["index"]) for row in EXPORTED]
    for other in ("{}", "[1]", '["a"]', "{", json.dumps(swapped), json.dumps(EXPORTED[:2])):
        table.write_text(other)
        images, labels = names_of_images()
        assert images != labels


def test_names_that_are_in_no_table_of_ours_are_not_guessed(tmp_path):
    """Names of other classes than the data's are asked about, where numbers were taken."""
    write_kind(tmp_path, "folder", "")
    with pytest.raises(UserError, match="=numbers   its label 0 .b_cat. is the data's class 0"):
        opened(tmp_path, names=("x", "y", "z"))
    assert_same(tmp_path, names=None)  # the data has none
