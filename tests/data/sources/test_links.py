"""Links in tars and in folders."""

from __future__ import annotations

import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
from helpers.images import encoded, random_pixels, write_tree

from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import open_source, read_all, tars
from prism_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*classes of imagenet:UserWarning")


def picture(seed: int) -> bytes:
    return encoded(random_pixels(8, 8, 3, seed=seed))


def tar_of(path: pathlib.Path, *members: tuple[str, bytes | str | None]) -> pathlib.Path:
    """A tar by hand: (name, bytes), (name, "-> symbolic"), (name, "= hard"), or a folder's name."""
    with tarfile.open(path, "w") as tar:
        for name, what in members:
            member = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                member.size = len(what)
                tar.addfile(member, io.BytesIO(what))
                continue
            if what is None:
                member.type = tarfile.DIRTYPE
            else:
                kind, member.linkname = what.split(" ", 1)
                member.type = {"->": tarfile.SYMTYPE, "=": tarfile.LNKTYPE}[kind]
            tar.addfile(member)
    return path


def opened(path, source="tar", **options):
    return open_source(
        name="imagenet", source=source, path=path, split="train", image_size=8, **options
    )


def read_names(source) -> dict[str, int]:
    """The images by their names from the split on, each as the seed of its pixels."""
    seeds = {random_pixels(8, 8, 3, seed=seed).tobytes(): seed for seed in range(10)}
    images, _ = read_all(source)
    return {
        source.name(i).split("train/", 1)[1]: seeds[image.tobytes()]
        for i, image in enumerate(images)
    }


def test_links_in_a_tar_are_followed(tmp_path):
    tar = tar_of(
        tmp_path / "a.tar",
        ("set/train/a/later.png", "= set/train/b/0.png"),  # a member that comes later
        ("set/train/a/0.png", picture(0)),
        ("set/train/a/hard.png", "= set/train/a/0.png"),
        ("set/train/a/hard2.png", "= ./set/train/a/hard.png"),
        ("set/train/a/soft.png", "-> 0.png"),
        ("set/train/a/chain.png", "-> ../b/../a/./soft.png"),
        ("set/train/a/other.png", "-> ../b/0.png"),
        ("set/train/b/0.png", picture(1)),
        ("set/train/a/below", "-> ../../pool"),  # a folder
        ("set/train/c", "-> ../pool"),  # a class of links
        ("set/train/d/x.png", "-> ../c/deep/3.png"),  # through a folder that is a link
        ("set/pool/2.png", picture(2)),
        ("set/pool/deep/3.png", picture(3)),
    )
    source = opened(tar)
    assert source.class_names == ("a", "b", "c", "d") and source.left_out == 0
    assert read_names(source) == {
        "a/0.png": 0, "a/hard.png": 0, "a/hard2.png": 0, "a/soft.png": 0, "a/chain.png": 0,
        "a/later.png": 1, "a/other.png": 1, "b/0.png": 1,
        "a/below/2.png": 2, "a/below/deep/3.png": 3, "c/2.png": 2, "c/deep/3.png": 3, "d/x.png": 3,
    }  # fmt: skip


def test_a_tar_with_links_is_the_set_that_it_unpacks_to(tmp_path):
    root = write_tree(tmp_path / "tree")
    train = root / "train"
    os.link(train / "n01" / "img_0.png", train / "n01" / "img_3.png")
    (train / "n02" / "img_4.png").symlink_to("../n01/img_1.png")
    (train / "n03").symlink_to("n01")
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        tar.add(root, arcname=".")
        assert sum(member.islnk() or member.issym() for member in tar.getmembers()) == 3
    packed, folder = opened(tmp_path / "tree.tar"), opened(root, "folder")
    assert packed.describe() == folder.describe()
    for ours, theirs in zip(read_all(packed), read_all(folder), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(packed) == 4 + 4 + 4


def test_a_hard_link_has_the_content_that_its_name_had_then(tmp_path):
    tar = tar_of(
        tmp_path / "a.tar",
        ("train/a/0.png", picture(0)),
        ("train/a/1.png", "= train/a/0.png"),
        ("train/a/0.png", picture(2)),  # replaced, as `tar -r` does
    )
    assert read_names(opened(tar)) == {"a/0.png": 2, "a/1.png": 0}


LOST = {
    "absent": ("-> nowhere.png", "a link to nowhere.png, which the archive does not hold"),
    "absent hard": ("= train/a/9.png", "a link to train/a/9.png, which the archive does not hold"),
    "itself": ("-> x.png", "a link to x.png, in a circle of links"),
    "circle": ("-> y.png", "in a circle of links"),
    "outside": ("-> ../../../etc/x.png", "a link to ../../../etc/x.png, outside the archive"),
    "absolute": ("-> /etc/passwd", "a link to /etc/passwd, outside the archive"),
    "below a file": ("-> 0.png/x", "which the archive does not hold"),
}


@pytest.mark.parametrize("case", LOST)
def test_links_that_lead_nowhere_are_named_and_not_followed(tmp_path, case, capsys):
    target, said = LOST[case]
    members = [("train/a/0.png", picture(0)), ("train/a/y.png", "-> x.png")][
        : 1 + (case == "circle")
    ]
    tar = tar_of(tmp_path / "a.tar", *members, ("train/a/x.png", target))
    with pytest.raises(DamagedFile, match="train/a/[xy].png cannot be read") as error:
        read_all(opened(tar))
    assert said in str(error.value)
    assert opened(tar, damaged="skip").left_out == len(members)
    # Under a name that is no image's it is no image.
    tar = tar_of(tmp_path / "b.tar", members[0], ("train/a/x", target.replace("x.png", "x")))
    capsys.readouterr()
    source = opened(tar)
    assert len(source) == 1 and source.left_out == 1
    assert ": a/x\n" in capsys.readouterr().out


def test_a_link_to_a_folder_around_it_is_named_once(tmp_path, capsys):
    tar = tar_of(
        tmp_path / "a.tar",
        ("train/a/0.png", picture(0)),
        ("train/b/1.png", picture(1)),
        ("train/a/up", "-> .."),
        ("train/a/self", "-> ."),
        ("train/a/b", "-> ../b"),
        ("train/b/a", "-> ../a"),
    )
    source = opened(tar)
    names = read_names(source)
    assert names == {"a/0.png": 0, "a/b/1.png": 1, "b/1.png": 1, "b/a/0.png": 0}
    assert "a link to a folder that it lies in" in capsys.readouterr().out


def test_links_that_multiply_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_MOST", 100)
    folders = [("train/0/x.png", picture(0))]
    for depth in range(1, 8):  # 2 ** 8 ways down
        folders += [(f"train/{depth}/{way}", f"-> ../{depth - 1}") for way in "ab"]
    with pytest.raises(UserError, match="its links make more than 100 files of 15"):
        opened(tar_of(tmp_path / "a.tar", *folders))


def test_links_in_folders_are_followed_and_circles_end(tmp_path, capsys):
    root = write_tree(tmp_path / "tree", splits=["train"])
    first = root / "train" / "n01"
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "p.png").write_bytes(picture(7))
    (first / "self").symlink_to(".")
    (first / "up").symlink_to("..")
    (first / "pool").symlink_to(tmp_path / "pool")
    (first / "img_9.png").symlink_to("img_0.png")
    (first / "circle").symlink_to("circle")
    (first / "gone").symlink_to("nowhere")
    (root / "train" / "n04").symlink_to("n04")
    source = opened(root, "folder")
    said = capsys.readouterr().out
    assert {name for name in read_names(source) if name.startswith("n01")} == {
        "n01/img_0.png", "n01/img_1.png", "n01/img_2.png", "n01/img_9.png", "n01/pool/p.png",
    }  # fmt: skip
    assert source.left_out == 5
    assert "2 x a link to a folder that it lies in: n01/" in said
    assert "3 x a link to nothing: " in said and "n01/circle" in said and "n04" in said
