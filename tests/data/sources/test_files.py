from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
import warnings

import numpy as np
import pytest
from helpers.images import encoded, random_pixels, write_tar, write_tree

from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import class_order, open_source, read_all
from prism_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*classes of imagenet:UserWarning")


def open_imagenet(path, source="folder", split="train", size=8):
    return open_source(name="imagenet", source=source, path=path, split=split, image_size=size)


def test_folder_and_tar_hold_the_same_images_in_image_folder_order(tmp_path):
    root = write_tree(tmp_path / "tree")
    # What ImageFolder walks into, and what it leaves alone.
    (root / "train" / "n01" / "deep").mkdir()
    (root / "train" / "n01" / "deep" / "a.PNG").write_bytes(
        encoded(random_pixels(8, 8, 3, seed=99))
    )
    (root / "train" / "n01" / "notes.txt").write_text("no image")
    (root / "train" / "n01" / "._img_0.png").write_text("no image either")
    (root / "train" / "README.md").write_text("no class")
    tar = write_tar(root, tmp_path / "tree.tar")
    wanted = [random_pixels(8, 8, 3, seed=s) for s in (0, 1, 2, 99, 3, 4, 5)]
    folder, packed = open_imagenet(root), open_imagenet(tar, "tar")
    for source in (folder, packed):
        images, labels = read_all(source)
        np.testing.assert_array_equal(images, wanted)
        np.testing.assert_array_equal(labels, [0, 0, 0, 0, 1, 1, 1])
        assert labels.dtype == np.int32 and source.num_classes == 2
    assert folder.describe() == packed.describe()
    json.dumps(folder.describe())
    assert len(open_imagenet(root, split="test")) == len(open_imagenet(tar, "tar", "test")) == 6
    assert open_imagenet(root, split="test").describe() != folder.describe()


def test_order_is_that_of_an_independent_walk(tmp_path):

    root = write_tree(tmp_path, classes=("b", "B", "a10", "a9", "ä"), suffix="_10.png")
    for name in ("train/b/img_9.png", "train/b/sub/img_1.png", "train/b/sub.x/img_1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(encoded(random_pixels(8, 8, 3)))
    walked = [
        os.path.relpath(os.path.join(at, file), root / "train").replace(os.sep, "/")
        for cls in sorted(os.listdir(root / "train"))
        for at, _, files in sorted(os.walk(root / "train" / cls))
        for file in sorted(files)
    ]
    source = open_imagenet(root)
    named = [os.path.relpath(source.name(i), root / "train") for i in range(len(source))]
    assert named == walked


def test_identity_sees_names_and_sizes(tmp_path):
    root = write_tree(tmp_path)
    before = open_imagenet(root).describe()
    assert open_imagenet(root).describe() == before
    path = root / "train" / "n01" / "img_0.png"
    path.write_bytes(path.read_bytes() + b"\0")
    larger = open_imagenet(root).describe()
    path.rename(path.with_name("img_00.png"))
    renamed = open_imagenet(root).describe()
    assert len({d["digest"] for d in (before, larger, renamed)}) == 3
    assert open_imagenet(root, size=4).describe() != renamed


def test_numeric_class_folders_sort_as_numbers_with_a_warning(tmp_path):
    root = write_tree(tmp_path, classes=[str(i) for i in range(11)])
    with pytest.warns(UserWarning, match="numeric order"):
        source = open_imagenet(root)
    # Image 3 * c is the first of folder str(c), whose pixels write_tree made with that seed.
    np.testing.assert_array_equal(source.image(6), random_pixels(8, 8, 3, seed=6))
    assert source.labels_N[6] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert class_order({"00", "02", "10"}) == ["00", "02", "10"]
        assert class_order({"n2", "n10"}) == ["n10", "n2"]


@pytest.mark.parametrize(
    ("classes", "suffix"),
    [
        (("train", "tray"), ".png"),  # CIFAR-100 has a class called train
        (("test", "train", "val", "validation"), ".png"),
        (("a/val", "b"), ".png"),
        (("a", "b/train/test"), "/x/val/0.png"),
    ],
)
@pytest.mark.parametrize("around", ["", "./", "set/", "deep/set/"])
def test_folders_called_as_splits_are_read_alike_in_a_folder_and_in_a_tar(
    tmp_path, classes, suffix, around
):
    root = write_tree(tmp_path / "tree", classes=classes, suffix=suffix)
    (root / "train" / classes[0] / "notes.txt").write_text("no image")
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        for split in ("train", "val"):
            tar.add(root / split, arcname=f"{around}{split}")
    for split in ("train", "test"):
        folder, packed = (
            open_imagenet(root, split=split),
            open_imagenet(tmp_path / "tree.tar", "tar", split),
        )
        assert folder.class_names == packed.class_names == tuple(c.split("/")[0] for c in classes)
        np.testing.assert_array_equal(folder.labels_N, packed.labels_N)
        assert len(folder) == 3 * len(classes)
        assert folder.left_out == packed.left_out == (split == "train")
        assert folder.describe() == packed.describe()


@pytest.mark.parametrize("again", ["set/", "./set/"])
def test_a_split_below_two_folders_of_a_tar_is_refused(tmp_path, again):
    """Whichever comes later replaced the other; in an archive that was added to, it should."""
    root, other = write_tree(tmp_path / "a"), write_tree(tmp_path / "b", classes=("n02", "n01"))
    with tarfile.open(tmp_path / "both.tar", "w") as tar:
        tar.add(root, arcname="set"), tar.add(other, arcname=again)
    wanted = open_imagenet(other).describe()
    assert open_imagenet(tmp_path / "both.tar", "tar").describe() == wanted
    with tarfile.open(tmp_path / "both.tar", "a") as tar:
        tar.add(root, arcname="masks")
    said = r"holds train/n01/img_0.png twice, as .*set/train/n01/img_0.png and as masks/train/n01/"
    with pytest.raises(UserError, match=said):
        open_imagenet(tmp_path / "both.tar", "tar")


def test_one_tar_file_per_split(tmp_path):
    for split in ("train", "val"):
        write_tar(write_tree(tmp_path / split, splits=[split]), tmp_path / f"data_{split}.tar")
    path = tmp_path / "data_{split}.tar"
    assert len(open_imagenet(path, "tar")) == len(open_imagenet(path, "tar", "test")) == 6
    with pytest.raises(UserError, match="no folder val"):
        open_imagenet(tmp_path / "data_train.tar", "tar", "test")


@pytest.mark.parametrize("kind", ["folder", "tar", "a tar per split"])
def test_both_splits_need_the_same_classes(tmp_path, kind):
    """Counted by itself, the dog of {dog, zebra} was tested as the cat of {cat, dog}."""
    write_tree(tmp_path / "tree", splits=["train"], classes=("cat", "dog"))
    write_tree(tmp_path / "tree", splits=["val"], classes=("dog", "zebra"))
    path = tmp_path / "tree"
    if kind == "tar":
        path = write_tar(path, tmp_path / "tree.tar")
    elif kind == "a tar per split":
        for split in ("train", "val"):
            with tarfile.open(tmp_path / f"data_{split}.tar", "w") as tar:
                tar.add(path / split, arcname=split)
        path = tmp_path / "data_{split}.tar"
    source = "folder" if kind == "folder" else "tar"
    with pytest.raises(UserError, match="zebra is a class that the training split does not have"):
        open_imagenet(path, source, "test")
    assert open_imagenet(path, source).class_names == ("cat", "dog")
    if kind == "a tar per split":  # a test split alone has its own classes
        (tmp_path / "data_train.tar").unlink()
        assert open_imagenet(path, source, "test").class_names == ("dog", "zebra")


def test_damaged_images_are_named(tmp_path):
    root = write_tree(tmp_path / "tree")
    path = root / "train" / "n02" / "img_1.png"
    content = path.read_bytes()
    jpeg = encoded(random_pixels(64, 64, 3), "JPEG")
    for data in (b"", content[:10], content[: len(content) // 2], jpeg[: len(jpeg) // 2], b"text"):
        path.write_bytes(data)
        tar = write_tar(root, tmp_path / "tree.tar")
        for source, where in ((open_imagenet(root), path), (open_imagenet(tar, "tar"), tar)):
            assert source.image(3).shape == (8, 8, 3)
            with pytest.raises(DamagedFile, match="n02/img_1.png is not a readable image") as error:
                source.image(4)
            assert str(where) in str(error.value)
    source = open_imagenet(root)
    path.unlink()
    with pytest.raises(DamagedFile, match="n02/img_1.png cannot be read"):
        source.image(4)


DAMAGES = {
    "cut": "unexpected end of data",
    "cut at a member": "cut short or damaged at byte",
    "header": "cut short or damaged at byte",
    "zeros": "another file at byte",
    "two": "several archives one after another",
    "empty": "empty file",
    "gzip": "it is compressed with gzip",
    "zip": "it is a zip file",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_never_passes_for_a_smaller_one(tmp_path, damage):
    tar = write_tar(write_tree(tmp_path / "tree"), tmp_path / "tree.tar")
    with tarfile.open(tar) as opened:
        member = opened.getmembers()[-3]
    data = bytearray(tar.read_bytes())
    if damage == "cut":
        data = data[: member.offset_data + 10]
    elif damage == "cut at a member":
        data = data[: member.offset]
    elif damage == "header":
        data[member.offset + 3] ^= 1
    elif damage == "zeros":
        data[member.offset : member.offset + 512] = bytes(512)
    elif damage == "two":
        data += bytes(data)
    elif damage == "zip":
        data = b"PK\3\4" + bytes(1000)
    elif damage == "empty":
        data = b""
    else:
        data = gzip.compress(data)
    tar.write_bytes(data)
    if damage in ("header", "zeros"):  # tarfile itself takes it for the end
        with tarfile.open(tar) as opened:
            assert member.name not in opened.getnames()
    with pytest.raises(UserError, match=f"tree.tar (is|has).*{DAMAGES[damage]}"):
        open_imagenet(tar, "tar")


def test_trees_that_cannot_be_right_are_refused(tmp_path):
    root = write_tree(tmp_path / "a")
    (root / "train" / "n03").mkdir()
    with pytest.raises(UserError, match="no image for 1 of 3 classes \\(n03\\)"):
        open_imagenet(root)
    root = write_tree(tmp_path / "b", splits=["train"])
    write_tree(root, splits=["val"], classes=["n01", "n02", "n07"])
    with pytest.raises(UserError, match="n07 is a class that the training split does not have"):
        open_imagenet(root, split="test")
    root = write_tree(tmp_path / "c", splits=["val"])
    with pytest.raises(UserError, match="has no folder train"):
        open_imagenet(root)
    with pytest.raises(UserError, match=f"train: name the folder around it, {tmp_path / 'b'};"):
        open_imagenet(tmp_path / "b" / "train")
    (tmp_path / "d" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no class folders"):
        open_imagenet(tmp_path / "d")
    root = write_tree(tmp_path / "e", classes=[f"c{i:02d}" for i in range(11)])
    with pytest.raises(UserError, match="holds 11 classes, but imagenette has 10"):
        open_source(name="imagenette", source="folder", path=root, split="train", image_size=8)


@pytest.mark.parametrize("source", ["folder", "tar"])
@pytest.mark.parametrize("around", ["", "test/"])
def test_a_test_split_without_classes_that_hides_a_good_one_is_said(tmp_path, source, around):
    """As Kaggle's competitions have it: images whose classes are secret."""
    root = write_tree(tmp_path / "set", splits=["train", "val"])
    (root / "test" / around).mkdir(parents=True)
    for i in range(3):
        image = encoded(random_pixels(8, 8, 3, seed=i))
        (root / "test" / around / f"{i}.png").write_bytes(image)

    def opened():
        path = root if source == "folder" else write_tar(root, tmp_path / "set.tar")
        return open_source(name="own", source=source, path=path, split="test", image_size=8)

    with pytest.raises(UserError, match="val/ has these classes: rename test/, or remove it; "):
        opened()
    (root / "val" / "n01").rename(root / "val" / "n07")  # the twin: it has not
    with pytest.raises(UserError) as caught:
        opened()
    assert "has these classes" not in str(caught.value)
    (root / "val" / "n07").rename(root / "val" / "n01")
    shutil.rmtree(root / "test")
    assert len(opened()) == 6


@pytest.mark.parametrize("source", ["folder", "tar"])
@pytest.mark.parametrize(
    ("splits", "asked", "said"),
    [
        (["Train", "Test"], "train", "no folder train, but Train: rename Train to train;"),
        (["training", "val"], "train", "no folder train, but training: rename training to train;"),
        (["train", "valid"], "test", "validation, but valid: rename valid to test;"),
        (["train"], "test", "only train: a part of the images of each class belongs into test/"),
        ([""], "train", "if n01, n02 are its classes, they belong into train, and a part of"),
        (["images"], "train", "(only images|if n01, n02 are its classes)"),  # a tar's wrapper
        (["extra", "images"], "train", "only extra, images;"),
    ],
)
def test_what_is_there_in_place_of_a_split_is_said(tmp_path, source, splits, asked, said):
    root = write_tree(tmp_path / "tree", splits=splits)
    path = root if source == "folder" else write_tar(root, tmp_path / "tree.tar")
    with pytest.raises(UserError, match=said):
        open_source(
            name="digits", source=source, path=str(path), split=asked, image_size=8
        )  # a set that is tested on test


def test_what_macos_adds_is_no_class(tmp_path, capsys):
    root = write_tree(tmp_path / "a")
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / "__MACOSX" / "._img.png").write_bytes(b"x")
    for source, path in (("folder", root), ("tar", write_tar(root, tmp_path / "a.tar"))):
        with pytest.warns(UserWarning, match="holds 2 of the 10 classes"):
            opened = open_source(
                name="imagenette", source=source, path=str(path), split="train", image_size=8
            )
        assert opened.class_names == ("n01", "n02") and len(opened) == 6
        assert "1 x hidden: __MACOSX/" in capsys.readouterr().out


def test_hidden_folders_are_none_at_any_depth(tmp_path):
    root = write_tree(tmp_path / "a", splits=("train", "test"))
    for within in ("", "deep/"):
        kept = root / "train" / "n01" / f"{within}.ipynb_checkpoints"
        kept.mkdir(parents=True)
        (kept / "img_9-checkpoint.png").write_bytes(encoded(random_pixels(8, 8, 3, seed=9)))
    for source, path in (("folder", root), ("tar", write_tar(root, tmp_path / "a.tar"))):
        with pytest.warns(UserWarning, match="2 of the 10 classes"):
            opened = open_source(
                name="digits", source=source, path=str(path), split="train", image_size=8
            )
        assert len(opened) == 6


def test_a_class_folder_whose_name_is_no_text_is_refused(tmp_path):
    root = write_tree(tmp_path / "a", splits=("train", "test"))
    for split in ("train", "test"):
        os.rename(root / split / "n02", os.path.join(os.fsencode(root / split), b"caf\xe9"))
    for source, path in (("folder", root), ("tar", write_tar(root, tmp_path / "a.tar"))):
        with pytest.raises(UserError, match=r"no UTF-8, b'caf\\xe9'; rename it"):
            open_source(name="digits", source=source, path=str(path), split="train", image_size=8)


def test_a_path_of_another_kind_says_which_source_reads_it(tmp_path):
    root = write_tree(tmp_path / "tree")
    tar = write_tar(root, tmp_path / "tree.tar")
    with pytest.raises(UserError, match="tree.tar is a file \\(which dataset.source=tar reads\\);"):
        open_imagenet(tar, "folder")
    with pytest.raises(
        UserError, match="tree is a folder \\(which dataset.source=folder reads\\);"
    ):
        open_imagenet(root, "tar")
    with pytest.raises(UserError, match="img_0.png is a file; dataset.source=folder needs"):
        open_imagenet(root / "train" / "n01" / "img_0.png", "folder")


def test_a_part_of_the_classes_warns_that_labels_are_positions(tmp_path):
    with pytest.warns(UserWarning, match="2 of the 1000 classes of imagenet"):
        open_imagenet(write_tree(tmp_path))


# --- WordNet IDs ---

NETTE = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)


def open_nette(path, **options):
    given = {"name": "imagenette", "source": "folder", "path": path, "split": "train"}
    return open_source(**given | {"image_size": 8} | options)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_wordnet_ids_are_known_as_classes_of_imagenet(tmp_path, kind):
    root = write_tree(tmp_path / "tree", classes=NETTE)
    path = root if kind == "folder" else write_tar(root, tmp_path / "tree.tar")
    wanted = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    source = open_nette(path, source=kind)
    assert source.class_names == NETTE and source.imagenet_indices == wanted
    # The same images as a part of ImageNet: labels are positions, the indices tell the classes.
    assert open_imagenet(path, kind).imagenet_indices == wanted


def test_any_part_of_imagenet_is_known_by_its_ids_and_other_names_are_not(tmp_path):
    part = open_imagenet(write_tree(tmp_path / "a", classes=["n01443537", "n15075141"]))
    assert part.imagenet_indices == (1, 999)
    assert open_imagenet(write_tree(tmp_path / "b")).imagenet_indices is None
    names = "tench,English springer,cassette player,chain saw,church,French horn,garbage truck"
    names = [*names.split(","), "gas pump", "golf ball", "parachute"]
    with pytest.warns(UserWarning, match="in the order English springer, French horn, cassette"):
        named = open_nette(write_tree(tmp_path / "c", classes=names))
    assert named.imagenet_indices == (217, 566, 482, 491, 497, 569, 571, 574, 701, 0)
    numbers = open_nette(write_tree(tmp_path / "d", classes=[f"{i:02d}" for i in range(10)]))
    assert numbers.imagenet_indices == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    others = open_nette(write_tree(tmp_path / "e", classes=[f"thing {i}" for i in range(10)]))
    assert others.imagenet_indices is None


def test_other_classes_of_imagenet_are_not_taken_for_imagenette(tmp_path):
    root = write_tree(tmp_path, classes=[*NETTE[:9], "n02086240"])
    with pytest.raises(UserError, match="other classes of ImageNet than imagenette.* n02086240"):
        open_nette(root)


# --- validation images in one folder ---


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_imagenets_numbered_validation_images_find_their_classes(tmp_path, kind):
    # The classes of numbers 1 and 2 as ImageNet's development kit has them.
    classes = ("n01751748", "n09193705")
    root = write_tree(tmp_path / "tree", splits=["train"], classes=classes)
    (root / "val").mkdir()
    for number in (1, 2, 4):
        data = encoded(random_pixels(8, 8, 3, seed=100 + number))
        (root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(data)

    def open_val():
        path = root if kind == "folder" else write_tar(root, tmp_path / "tree.tar")
        return open_imagenet(path, kind, "test")

    with pytest.raises(UserError, match="is a class that the training split does not have"):
        open_val()  # number 4 is neither
    (root / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()
    flat = open_val()
    described = flat.describe()
    images, labels = read_all(flat)
    np.testing.assert_array_equal(labels, [0, 1])
    np.testing.assert_array_equal(images[1], random_pixels(8, 8, 3, seed=102))
    # It is the same set as sorted into folders.
    for cls, number in zip(classes, (1, 2), strict=True):
        (root / "val" / cls).mkdir()
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        (root / "val" / name).rename(root / "val" / cls / name)
        assert open_val().describe() == described  # with one of them moved, too


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_tiny_imagenets_table_tells_the_classes(tmp_path, kind):
    root = write_tree(
        tmp_path / "tree", splits=["train"], classes=("n01443537/images", "n02056570/images")
    )
    (root / "train" / "n01443537" / "n01443537_boxes.txt").write_text("no image")
    (root / "val" / "images").mkdir(parents=True)
    for i in range(3):
        data = encoded(random_pixels(8, 8, 3, seed=50 + i))
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(data)
    lines = ["val_0.JPEG\tn02056570\t0\t0\t1\t1", "val_1.JPEG\tn01443537\t0\t0\t1\t1"]
    table = root / "val" / "val_annotations.txt"
    table.write_text("\n".join([*lines, "val_2.JPEG\tn02056570\t0\t0\t1\t1"]) + "\n")

    def read():
        path = root if kind == "folder" else write_tar(root, tmp_path / "tree.tar")
        source = open_source(
            name="tiny_imagenet", source=kind, path=path, split="test", image_size=8
        )
        return *read_all(source), source.describe()

    with pytest.warns(UserWarning, match="2 of the 200 classes"):
        images, labels, described = read()
    np.testing.assert_array_equal(labels, [0, 1, 1])
    wanted = [random_pixels(8, 8, 3, seed=50 + i) for i in (1, 0, 2)]
    np.testing.assert_array_equal(images, wanted)
    # It is the same set where the images were moved into class folders, and the table left.
    for i, cls in enumerate(("n02056570", "n01443537", "n02056570")):
        (root / "val" / cls).mkdir(exist_ok=True)
        image = root / "val" / "images" / f"val_{i}.JPEG"
        image.rename(root / "val" / cls / image.name)
        with pytest.warns(UserWarning, match="2 of the 200 classes"):
            some, labels, moved = read()
        np.testing.assert_array_equal(labels, [0, 1, 1])  # with some of them moved, too
        np.testing.assert_array_equal(np.sort(some.ravel()), np.sort(images.ravel()))
    assert moved == described


def test_test_images_without_labels_are_not_taken_for_a_test_split(tmp_path):
    root = write_tree(tmp_path, splits=["train", "test"])
    with pytest.raises(UserError, match="has no folder val or validation"):
        open_imagenet(root, split="test")
    with pytest.warns(UserWarning, match="2 of the 10 classes"):  # CIFAR's test split is one
        assert len(open_nette(root, name="cifar10", split="test")) == 6
