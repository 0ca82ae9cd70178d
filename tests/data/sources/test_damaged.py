from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest
from helpers.images import random_pixels, write_tar, write_tree

from prism_jax.data.image_set import DamagedFile
from prism_jax.data.pipeline import batches
from prism_jax.data.sources import ArraySource, base, damaged, open_source, read_all
from prism_jax.data.sources.base import cached
from prism_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*classes of imagenet:UserWarning")

DAMAGED = ("n01/img_1.png", "n02/img_2.png")  # positions 1 and 5 of the six training images


@pytest.fixture
def root(tmp_path):
    root = write_tree(tmp_path / "tree")
    for name in DAMAGED:
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[:40])
    return root


def opened(path, source="folder", damaged="skip", split="train", **options):
    return open_source(
        name="imagenet", source=source, path=path, split=split, image_size=8, damaged=damaged,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_damaged_images_are_left_out_named_and_counted(root, tmp_path, capsys, kind):
    path = root if kind == "folder" else write_tar(root, tmp_path / "tree.tar")
    source = opened(path, kind)
    said = capsys.readouterr().out
    assert [said.count(name) for name in DAMAGED] == [1, 1]
    assert "2 of 6 images are damaged and left out" in said
    assert len(source) == 4 and source.left_out == 2
    images, labels = read_all(source)
    np.testing.assert_array_equal(labels, [0, 0, 1, 1])
    wanted = [random_pixels(8, 8, 3, seed=s) for s in (0, 2, 3, 4)]
    np.testing.assert_array_equal(images, wanted)
    assert opened(path, kind, split="test").left_out == 0


def test_to_stop_is_the_default_and_names_the_file(root):
    source = open_source(name="imagenet", source="folder", path=root, split="train", image_size=8)
    with pytest.raises(DamagedFile, match=f"{DAMAGED[0]} is not a readable.*dataset.damaged=skip"):
        read_all(source)


def test_identity_says_what_is_left_out(root):
    whole, readable = opened(root, damaged="stop").describe(), opened(root).describe()
    assert readable["count"] == 4 and readable["left_out"]["count"] == 2
    assert whole != readable
    path = root / "train" / "n01" / "img_0.png"
    path.write_bytes(b"x" * path.stat().st_size)  # the same names and sizes
    assert opened(root).describe() != readable
    # Nothing damaged: the same set as without looking.
    assert (
        opened(root, split="test").describe()
        == opened(root, damaged="stop", split="test").describe()
    )


@pytest.mark.parametrize("threads", [1, 5])
def test_batches_are_those_of_a_set_without_the_damaged_files(root, tmp_path, threads):
    source = opened(root, threads=threads)
    for name in DAMAGED:
        (root / "train" / name).unlink()
    clean = opened(root, damaged="stop")
    options = {"batch_size": 3, "epochs": 2, "seed": 1, "name": "x"}
    found = list(batches(source, threads=2, **options))
    for ours, theirs in zip(found, batches(clean, **options), strict=True):
        np.testing.assert_array_equal(ours.images_BHWC, theirs.images_BHWC)
        np.testing.assert_array_equal(ours.labels_B, theirs.labels_B)
        assert ours.number == theirs.number
    seen = [sorted(i for b in found if b.epoch == e for i in b.index_B) for e in range(2)]
    assert seen == [[0, 1, 2, 3]] * 2


def test_many_files_are_looked_at_as_one_is(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(70)]
    for i, path in enumerate(paths[:-1]):
        pathlib.Path(path).write_bytes(b"1" * i)
    found = base.file_states(paths)
    assert found == [base.file_state(path) for path in paths]
    assert [size for _, size, _ in found] == [*range(69), -1] and base.file_states([]) == []


def test_the_pass_is_done_once_per_state_of_the_files(root, monkeypatch):
    passes = []
    look = damaged._look_through
    monkeypatch.setattr(damaged, "_look_through", lambda *a: passes.append(1) or look(*a))
    opened(root), opened(root)
    assert len(passes) == 1
    path = root / "train" / DAMAGED[0]
    stamp = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))
    opened(root)
    assert len(passes) == 2


def test_a_link_to_nothing_is_a_damaged_image(root):
    path = root / "train" / "n02" / "img_0.png"
    path.unlink()
    path.symlink_to(root / "nowhere.png")
    assert opened(root).left_out == 3


def test_a_set_without_a_readable_image_is_refused(root):
    for path in (root / "train").glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 6 images can be read, such as .*img_0.png"):
        opened(root)


def test_arrays_need_no_look(capsys):
    source = ArraySource(random_pixels(2, 8, 8, 3), np.arange(2), num_classes=2)
    assert damaged.without_damaged(source, threads=1) is source
    assert capsys.readouterr().out == ""


def test_a_cache_that_cannot_be_written_or_is_damaged_is_none(tmp_path, monkeypatch):
    made = []

    def make():
        made.append(1)
        return np.arange(3)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        np.testing.assert_array_equal(cached("kind", "key", make), [0, 1, 2])
    assert len(made) == 1
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:20])
    np.testing.assert_array_equal(cached("kind", "key", make), [0, 1, 2])
    assert len(made) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    np.testing.assert_array_equal(cached("kind", "key", make), [0, 1, 2])
    assert len(made) == 3
