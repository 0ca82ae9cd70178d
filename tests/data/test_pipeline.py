from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.images import write_tree

from prism_jax.data.image_set import DamagedFile
from prism_jax.data.pipeline import (
    batches,
    epoch_order,
    num_batches,
    on_device,
    read_images,
    share_of,
)
from prism_jax.data.sources import ArraySource, open_source
from prism_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

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


# --- worker processes ---


@pytest.fixture
def folder(tmp_path):
    return write_tree(tmp_path / "tree", splits=["train"], classes=("a", "b", "c"))


def open_folder(root):
    with pytest.warns(UserWarning, match="of the 1000 classes"):
        return open_source(name="imagenet", source="folder", path=root, split="train", image_size=8)


def test_worker_processes_change_nothing(folder):
    source = open_folder(folder)
    options = {"batch_size": 4, "start": 1}
    found = read(source, workers=2, **options)
    assert same(found, read(source, **options))
    assert [len(b.index_B) for b in found] == [4, 1, 4, 4, 1, 4, 4, 1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_workers_partition_the_same_batches(source, processes):
    whole = read(source)
    shares = [read(source, share=(p, processes), workers=1) for p in range(processes)]
    assert same(sorted(sum(shares, []), key=lambda b: b.number), whole)


def test_a_damaged_image_in_a_worker_is_one_clear_message(folder):
    (folder / "train" / "b" / "img_1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="b/img_1.png is not a readable image") as error:
        read(open_folder(folder), workers=1)
    assert "Traceback" not in str(error.value)
    with pytest.raises(DamagedFile, match="b/img_1.png is not a readable image"):
        read(open_folder(folder), threads=2)


def test_a_worker_that_is_killed_ends_the_reading_with_a_message(source):
    class Deadly(ArraySource):
        def image(self, index):
            if index == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().image(index)

    images, labels = source._images, source.labels_N
    with pytest.raises(UserError, match="a process that reads images has ended"):
        read(Deadly(images, labels, num_classes=4), workers=2)


SCRIPT = """
import signal, sys, time, warnings
from prism_jax.data import pipeline, sources

def main():
    warnings.simplefilter("ignore")
    source = sources.open_source(name="imagenet", source="folder", path=sys.argv[1], split="train",
                                 image_size=8)
    found = pipeline.batches(source, batch_size=2, epochs=100000, seed=0, name="x", workers=2)
    next(found)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(print("asked to stop", flush=True)))
    print("reading", flush=True)
    left = 200  # batches after it: more than are read ahead
    for _ in found:
        time.sleep(0.01)
        left -= len(asked)
        if left == 0:
            print("another batch", flush=True)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped")
"""


def children(pid: int) -> list[int]:
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")  # one file per thread
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_run_and_without_a_traceback(folder, tmp_path, signum):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "reading\n"
        workers = children(process.pid)
        assert len(workers) >= 2
        if signum == signal.SIGINT:  # Ctrl-C reaches all processes of a terminal
            os.killpg(process.pid, signum)
        elif signum == signal.SIGTERM:  # as of a cluster: workers go on until the run has saved
            os.killpg(process.pid, signum)
            assert process.stdout.readline() == "asked to stop\n"
            assert process.stdout.readline() == "another batch\n"
            process.kill()
        else:
            process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        deadline = time.monotonic() + 60
        while any(pathlib.Path(f"/proc/{pid}/status").exists() for pid in workers):
            assert time.monotonic() < deadline, "workers outlived their run"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# --- on the way to the device ---


def test_batches_reach_the_device_unchanged_and_one_ahead(source):
    sent = []

    def put(array):
        sent.append(array)
        return jax.device_put(array)

    found, shown = on_device(batches(source, batch_size=SIZE, epochs=EPOCHS, seed=7,
                                     name="test/order"), put=put), []  # fmt: skip
    for batch in found:
        shown.append(batch)
        assert isinstance(batch.images_BHWC, jax.Array) and batch.images_BHWC.dtype == np.uint8
        assert isinstance(batch.number, int)
        assert len(sent) // 3 == min(len(shown) + 1, EPOCHS * num_batches(COUNT, SIZE))
    assert same(shown, read(source))


@pytest.mark.parametrize("threads", [0, 3])
def test_images_at_positions_come_in_their_order(source, threads):
    positions = np.random.default_rng(0).integers(0, COUNT, 150)
    found = read_images(source, positions, threads=threads)
    np.testing.assert_array_equal(found[:, 0, 0, 0], positions)
    assert found.dtype == np.uint8 and found.shape == (150, 2, 2, 1)


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
