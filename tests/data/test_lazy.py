from __future__ import annotations

import threading

import numpy as np
import pytest

from prism_jax.data import lazy as lazy_images
from prism_jax.data.lazy import LazyImages, OneByOne, chunks, hold, read_ahead

SET = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 1), np.uint8)


class Counting:
    """Reads from ``SET`` and remembers what it was asked for."""

    def __init__(self):
        self.asked: list[list[int]] = []

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        self.asked.append(positions.tolist())
        return SET[positions]


def lazy(read=None) -> LazyImages:
    return LazyImages(read or (lambda at: SET[at]), SET.shape)


@pytest.mark.parametrize(
    "index",
    [3, -1, np.int32(4), slice(2, 5), slice(None), slice(4, 4), [7], np.array([5, 0, 5]),
     np.arange(10) % 2 == 0],
    ids=str,
)  # fmt: skip
def test_it_is_indexed_as_its_array_is(index):
    found = lazy()[index]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, SET[index])


def test_what_is_not_there_is_refused_as_by_an_array():
    for index in (10, [0, 10], -11):
        with pytest.raises(IndexError):
            lazy()[index]


def test_it_reads_what_is_asked_for_and_keeps_nothing():
    read = Counting()
    images = lazy(read)
    assert (len(images), images.shape, images.dtype) == (10, SET.shape, np.uint8)
    assert read.asked == []
    for _ in range(2):
        _ = images[2:4]
    assert read.asked == [[2, 3], [2, 3]]


def test_small_sets_are_held():
    assert isinstance(hold(lazy(), limit_bytes=SET.size), np.ndarray)
    np.testing.assert_array_equal(hold(lazy(), limit_bytes=1e9), SET)
    assert isinstance(hold(lazy(), limit_bytes=SET.size - 1), LazyImages)


def test_sets_that_memory_cannot_hold_are_read_when_they_are_needed_and_that_is_said(
    monkeypatch, capsys
):
    monkeypatch.setattr(lazy_images.environment, "free_memory", lambda: 2 * SET.size)
    assert isinstance(hold(lazy(), limit_bytes=1e9), np.ndarray)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(lazy_images.parallel, "processes_here", lambda: 2)
    assert isinstance(hold(lazy(), limit_bytes=1e9), LazyImages)
    capsys.readouterr()
    monkeypatch.setattr(lazy_images.parallel, "processes_here", lambda: 1)
    monkeypatch.setattr(lazy_images.environment, "free_memory", lambda: 2 * SET.size - 1)
    assert isinstance(hold(lazy(), limit_bytes=1e9), LazyImages)
    assert (
        "10 images take 1.2e-07 GB, and of memory 2.39e-07 GB are free" in capsys.readouterr().out
    )


def test_what_is_held_is_read_in_parts_and_shown_where_it_is_much(monkeypatch, capsys):
    """All at once would take its memory twice."""
    monkeypatch.setattr(lazy_images, "chunks", lambda count: chunks(count, 4))
    monkeypatch.setattr(lazy_images, "LARGE_BYTES", SET.size - 1)
    read = Counting()
    np.testing.assert_array_equal(hold(lazy(read), limit_bytes=1e9), SET)
    assert [len(asked) for asked in read.asked] == [4, 4, 2]
    assert "reading images: 10/10 images in" in capsys.readouterr().out


def test_one_by_one_keeps_the_order_and_raises_what_reading_raises():
    together = threading.Barrier(2, timeout=30)

    def image(index: int) -> np.ndarray:
        assert isinstance(index, int)
        if index < 2:
            together.wait()  # two are read at once
        if index == 9:
            raise KeyError("nine")
        return SET[index]

    read = OneByOne(image, threads=2)
    np.testing.assert_array_equal(read(np.array([1, 0, 5])), SET[[1, 0, 5]])
    with pytest.raises(KeyError, match="nine"):
        read(np.array([8, 9]))


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_reading_ahead_gives_every_item_its_images(count):
    items = [np.array([i, (3 * i) % 10]) for i in range(count)]
    for images in (SET, lazy()):
        found = list(read_ahead(images, iter(items), lambda item: item))
        assert [item.tolist() for item, _ in found] == [item.tolist() for item in items]
        for item, pixels in found:
            np.testing.assert_array_equal(pixels, SET[item])


def test_reading_ahead_is_bounded_and_begins_before_it_is_asked():
    taken: list[int] = []

    def items():
        for i in range(10):
            taken.append(i)
            yield np.array([i])

    ahead = read_ahead(lazy(), items(), lambda item: item)
    next(ahead)
    assert taken == [0, 1, 2]
    ahead.close()
    taken.clear()
    more = read_ahead(lazy(), items(), lambda item: item, ahead=5)
    next(more)
    assert taken == [0, 1, 2, 3, 4, 5]
    more.close()
    eager = read_ahead(SET, items(), lambda item: item)
    taken.clear()
    next(eager)
    assert taken == [0]


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (8, 4), (9, 4)])
def test_chunks_cover_a_set_in_order(count, size):
    parts = [list(range(count))[part] for part in chunks(count, size)]
    assert sum(parts, []) == list(range(count))
    assert all(0 < len(part) <= size for part in parts)
