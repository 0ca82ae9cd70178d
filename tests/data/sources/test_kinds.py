"""Which files are images, and what is said of the others, in folders, tars and sets of others."""

from __future__ import annotations

import io
import os
import pathlib

import numpy as np
import pytest
from helpers.images import encoded, random_pixels, write_tar, write_tree
from PIL import Image

from prism_jax.data.exchange import ImageSet
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import ArraySource, info_of, kinds, open_source, read_all

pytestmark = pytest.mark.filterwarnings("ignore:.*classes of imagenet:UserWarning")

PIXELS = np.repeat(random_pixels(8, 8, seed=7)[..., None], 3, axis=2)  # grey: GIF keeps them
IMAGES = {
    "a.bmp": "BMP",
    "b.tif": "TIFF",
    "c.TIFF": "TIFF",
    "d.gif": "GIF",
    "e.ppm": "PPM",
    "f.jp2": "JPEG2000",
    "g.PNG": "PNG",
    "h": "PNG",  # no suffix, or none that is known
    "i.jpg_large": "PNG",
    "j.jpg": "PNG",  # a wrong one
    "k.txt": "PNG",
    "l \n.png": "PNG",
}
OTHERS = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._a.bmp": b"\0\5\26\7\0\2\0\0",
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "notes.md": b"P1 is not the magic of this text",
    "boxes.xml": b"<annotation/>",
    "README": b"",
}


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """Two classes in two splits; the first class has all kinds of files as well."""
    root = write_tree(tmp_path / "tree")
    for name, kind in IMAGES.items():
        (root / "train" / "n01" / name).write_bytes(encoded(PIXELS, kind))
    for name, data in OTHERS.items():
        (root / "train" / "n01" / name).write_bytes(data)
    return root


def test_the_same_files_are_the_same_set_in_a_folder_and_in_a_tar(root):
    first = root / "train" / "n01"
    os.mkfifo(first / "pipe.png")
    (first / "self.png").symlink_to(".")
    (first / "gone.png").symlink_to("nowhere")
    (first / "gone").symlink_to("nowhere")
    (first / "again.png").symlink_to("img_0.png")
    found = [open_as(kind, root, damaged="skip") for kind in ("folder", "tar")]
    assert found[0].describe() == found[1].describe()
    assert [source.left_out for source in found] == [len(OTHERS) + 4] * 2


def open_as(kind: str, root: pathlib.Path, **options):
    path = write_tar(root, root.parent / "tree.tar") if kind == "tar" else root
    if kind == "set":
        real = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), num_classes=2)
        return ImageSet(root / "train", info_of("imagenet", None), real, ipc=3, image_size=8)
    return open_source(
        name="imagenet", source=kind, path=path, split="train", image_size=8, **options
    )


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_every_kind_of_image_is_read(root, kind):
    source = open_as(kind, root)
    found = {os.path.basename(source.name(i)): i for i in np.flatnonzero(source.labels_N == 0)}
    assert found.keys() == {*IMAGES, "img_0.png", "img_1.png", "img_2.png"}
    for name in IMAGES:
        np.testing.assert_array_equal(source.image(found[name]), PIXELS, err_msg=name)
    assert len(source) == len(IMAGES) + 6


def test_every_suffix_that_pillow_decodes_is_known():
    for suffix in ".bmp .tif .tiff .gif .ppm .pgm .webp .jfif .jp2 .jpeg .jpg .png .tga".split():
        assert kinds.is_named_as_one(f"x{suffix}") and kinds.is_named_as_one(f"x{suffix.upper()}")
    for suffix in (".pdf", ".mpg", ".h5", ".eps", ".txt", ""):
        assert not kinds.is_named_as_one(f"x{suffix}")


@pytest.mark.parametrize("kind", ["folder", "tar", "set"])
def test_what_is_no_image_is_counted_and_named(root, capsys, kind):
    source = open_as(kind, root)
    said = capsys.readouterr().out
    assert source.left_out == len(OTHERS)
    assert f"as no images: {len(OTHERS)} files" in said
    assert all(name in said for name in OTHERS)
    read_all(source)
    open_as(kind, root)
    assert not capsys.readouterr().out  # once


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_files_and_hidden_folders_beside_the_classes_are_named_too(root, capsys, kind):
    (root / "train" / "stray.png").write_bytes(encoded(PIXELS))
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / ".ipynb_checkpoints" / "a.png").write_bytes(encoded(PIXELS))
    source = open_as(kind, root)
    said = capsys.readouterr().out
    assert "1 x in no class folder: stray.png" in said and ".ipynb_checkpoints/" in said
    assert source.left_out == len(OTHERS) + 2 and source.num_classes == 2


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_other_files_are_no_part_of_the_identity(root, kind):
    before = open_as(kind, root).describe()
    for name in OTHERS:
        (root / "train" / "n01" / name).unlink()
    after = open_as(kind, root)
    assert after.describe() == before and after.left_out == 0
    (root / "train" / "n01" / "a.bmp").unlink()
    assert open_as(kind, root).describe() != before


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("data", [b"", b"this is text", b"<html>404</html>"])
def test_what_is_named_as_an_image_and_is_none_is_damaged(root, kind, data):
    (root / "train" / "n02" / "x.jpg").write_bytes(data)
    with pytest.raises(DamagedFile, match="x.jpg is not a readable image"):
        read_all(open_as(kind, root))
    skipped = open_as(kind, root, damaged="skip")
    assert skipped.left_out == len(OTHERS) + 1 and len(skipped) == len(IMAGES) + 6


def test_a_cmyk_jpeg_under_the_name_of_a_png_is_read(root):
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(8, 8, 4), "CMYK").save(buffer, "JPEG")
    (root / "train" / "n02" / "x.png").write_bytes(buffer.getvalue())
    wanted = np.asarray(Image.open(buffer).convert("RGB"))
    np.testing.assert_array_equal(open_as("folder", root).image(-1), wanted)
