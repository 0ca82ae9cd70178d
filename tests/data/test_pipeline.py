from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from prism_jax.data.pipeline import batches, epoch_order, num_batches, share_of
from prism_jax.data.sources import ArraySource

COUNT, SIZE, EPOCHS = 23, 5, 3


@pytest.fixture
def source() -> ArraySource:
    images = np.arange(COUNT, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return ArraySource(images, np.arange(COUNT) % 4, num_classes=4)


def read(source, **options):
    options = {"batch_size": SIZE, "epochs": EPOCHS, "seed": 7, "name": "test/order"} | options
    return list(batches(source, **options))


def same(these, those) -> bool:
    return len(these) == len(those) and all(
        all(np.array_equal(a, b) for a, b in zip(this, that, strict=True))
        for this, that in zip(these, those, strict=True)
    )


def is_complete(found, per_epoch: int) -> bool:
    """Whether every image comes exactly once in every epoch, in ``per_epoch`` batches."""
    numbered = [(b.number, b.epoch, b.batch) for b in found]
    wanted = [(n, *divmod(n, per_epoch)) for n in range(EPOCHS * per_epoch)]
    seen = [sorted(i for b in found if b.epoch == e for i in b.index_B) for e in range(EPOCHS)]
    return numbered == wanted and seen == [list(range(COUNT))] * EPOCHS


def test_every_image_comes_once_per_epoch_and_the_last_batch_is_ragged(source):
    found = read(source)
    assert is_complete(found, num_batches(COUNT, SIZE))
    assert [len(b.index_B) for b in found] == [5, 5, 5, 5, 3] * EPOCHS
    # The twin that drops the remainder of an epoch is not complete.
    assert not is_complete([b for b in found if len(b.index_B) == SIZE], COUNT // SIZE)


@pytest.mark.parametrize("size, sizes", [(23, [23]), (22, [22, 1]), (1, [1] * 23), (100, [23])])
def test_epoch_boundaries_are_exact_for_any_batch_size(source, size, sizes):
    assert [len(b.index_B) for b in read(source, batch_size=size)] == sizes * EPOCHS
    assert num_batches(COUNT, size) == len(sizes)


def test_a_batch_holds_the_images_and_labels_of_its_index(source):
    for batch in read(source):
        assert batch.index_B.dtype == np.int32 and batch.labels_B.dtype == np.int32
        assert batch.images_BHWC.dtype == np.uint8
        np.testing.assert_array_equal(batch.images_BHWC[:, 1, 1, 0], batch.index_B)
        np.testing.assert_array_equal(batch.labels_B, batch.index_B % 4)


def test_resume_at_any_batch_equals_the_uninterrupted_run(source):
    whole = read(source)
    for start in range(len(whole) + 1):
        assert same(read(source, start=start), whole[start:])
    assert not same(read(source, start=3), whole[4:])


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 6])
def test_processes_partition_the_same_batches(source, processes, start):
    whole = read(source)
    shares = [read(source, share=(p, processes), start=start) for p in range(processes)]
    assert all(b.number % processes == p for p, share in enumerate(shares) for b in share)
    assert same(sorted(sum(shares, []), key=lambda b: b.number), whole[start:])


def test_share_of_keeps_each_number_with_its_process_whatever_the_start():
    assert list(share_of(10, 0, (1, 4))) == [1, 5, 9]
    assert list(share_of(10, 2, (1, 4))) == [5, 9]
    assert list(share_of(10, 5, (1, 4))) == [5, 9]
    assert list(share_of(10, 10, (1, 4))) == []


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (2, 4), (3, 0)])
def test_threads_change_nothing(source, threads, prefetch):
    assert same(read(source, threads=threads, prefetch=prefetch), read(source))


def test_orders_have_coordinates(source):
    orders = [epoch_order(*c) for c in [(0, "a", 0, 50), (1, "a", 0, 50), (0, "b", 0, 50),
                                        (0, "a", 1, 50)]]  # fmt: skip
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 4
    epoch_order.cache_clear()
    np.testing.assert_array_equal(epoch_order(0, "a", 0, 50), orders[0])
    in_order = np.concatenate([b.index_B for b in read(source, shuffle=False)])
    np.testing.assert_array_equal(in_order, np.tile(np.arange(COUNT), EPOCHS))


def test_the_order_is_pinned():
    np.testing.assert_array_equal(epoch_order(0, "pinned", 0, 8), [1, 5, 3, 4, 6, 2, 0, 7])


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_while_reading_reaches_the_caller_as_itself(source, threads):
    class Broken(Exception):
        pass

    class BrokenSource:
        labels_N, num_classes = source.labels_N, source.num_classes

        def __len__(self):
            return len(source)

        def image(self, index):
            if index == 12:
                raise Broken("image 12")
            return source.image(index)

    with pytest.raises(Broken, match="image 12"):
        read(BrokenSource(), threads=threads)


def test_tensorflow_is_never_imported():
    code = (
        "import sys\n"
        "from prism_jax.data import image_set, label_store, pipeline, sources\n"
        "source = sources.open_source(name='digits', source='sklearn', path=None, split='test',"
        " image_size=16)\n"
        "next(pipeline.batches(source, batch_size=4, epochs=1, seed=0, name='x'))\n"
        "import tensorflow_datasets\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
