"""Grain pipelines whose only state is the global batch number.

Batch ``n`` of a pipeline is a function of ``n``: its epoch is ``n // batches per epoch`` and its
images are a slice of that epoch's permutation. A run that stopped after batch ``n`` therefore
continues at ``start=n + 1`` with nothing lost or read twice, and processes share a pipeline by
taking every so-many-th number of it. Threads and processes that read ahead, and the buffer on the
device, change no batch.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

import cloudpickle
import jax
import numpy as np

from prism_jax import rng
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError

T = TypeVar("T")

_AT_ONCE = 64


class Batch(NamedTuple):
    """One batch of real images.

    Attributes:
      number: global batch number over all epochs.
      epoch, batch: its coordinates; ``batch`` counts within the epoch.
      index_B: int32 positions in the source.
      images_BHWC: uint8.
      labels_B: int32.
    """

    number: int
    epoch: int
    batch: int
    index_B: np.ndarray
    images_BHWC: np.ndarray
    labels_B: np.ndarray


def num_batches(count: int, batch_size: int) -> int:
    """Batches in an epoch of ``count`` images; the last one may be ragged."""
    return -(-count // batch_size)


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, name: str, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch: a permutation addressed by coordinates.

    Args:
      seed: of the stage that reads.
      name: of the stream ("squeeze/order/resnet18").
      epoch: which one.
      count: images in the set.

    Returns:
      int32 (count,), read-only.
    """
    order = rng.generator(seed, name, epoch).permutation(count).astype(np.int32)
    order.flags.writeable = False
    return order


def continuous_index(
    number: int, *, count: int, batch_size: int, seed: int, name: str
) -> np.ndarray:
    """The images of a batch when passes over the set follow one another without a gap.

    Every batch has ``batch_size`` images, so one compiled program serves them all; a batch that
    reaches the end of a pass goes on with the next one's order. Over any number of batches no
    image is read more often than another by more than one.

    Args:
      number: global batch number.
      count: images in the set.
      batch_size: images per batch; may exceed ``count``.
      seed, name: address of the orders, see ``epoch_order``.

    Returns:
      int32 (batch_size,).
    """
    positions = number * batch_size + np.arange(batch_size)
    return np.array(
        [epoch_order(seed, name, int(p) // count, count)[int(p) % count] for p in positions],
        np.int32,
    )


def share_of(total: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> range:
    """The global batch numbers from ``start`` on that fall to one process.

    Args:
      total: batches in all epochs.
      start: the first global number that is still to be read.
      share: (process, processes); a process takes the numbers that leave its own index as the
        remainder, whatever ``start`` is.
    """
    process, processes = share
    assert 0 <= process < processes and start >= 0
    return range(start + (process - start) % processes, total, processes)


def read_batches(
    numbers: range,
    read: Callable[[int], Any],
    *,
    threads: int = 0,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[Any]:
    """Read batches in the order of their numbers, with Grain.

    Args:
      numbers: global batch numbers.
      read: the batch of a number; called from several threads or processes at once.
      threads: that read ahead; 0 reads in the caller. Unused where there are ``workers``.
      workers: processes that read ahead in place of threads. They start by importing the main
        module, so a script that asks for them needs ``if __name__ == "__main__":``.
      prefetch: batches read ahead of the one asked for, at least one per thread or process.

    Raises:
      UserError: what ``read`` raised in a process, or a process ended.
    """
    if not numbers:
        return iter(())
    import grain

    batches = grain.MapDataset.range(numbers.start, numbers.stop, numbers.step)
    if not workers:
        ahead = max(prefetch, threads) if threads else 0
        return iter(batches.map(read).to_iter_dataset(grain.ReadOptions(threads, ahead)))
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(cloudpickle.dumps(read),),
    )

    def ask(number: int) -> Any:
        # Ctrl-C and a cluster's request to stop, which reach all processes, are the main thread's,
        # which saves. A process started here inherits that, from its first moment.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        return pool.submit(_answer, int(number)).result()

    # Grain's own processes hang where one of them ends; these do not. Its threads wait for them.
    batches = batches.map(ask)
    options = grain.ReadOptions(2 * workers, max(prefetch, 2 * workers))
    return _answers(pool, iter(batches.to_iter_dataset(options)))


_read: Callable[[int], Any]  # in a worker: what it was started for


def _start_worker(read: bytes) -> None:
    """Take what is to be read, and end when the main process has ended, however that came."""
    global _read

    def follow() -> None:
        main = multiprocessing.parent_process()
        assert main is not None  # this is a worker
        main.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _read = cloudpickle.loads(read)


def _answer(number: int) -> Any:
    """A batch, or the error a person has to see: raised here it would come with a traceback."""
    try:
        return _read(number)
    except UserError as error:
        return _Failed(str(error))


class _Failed(NamedTuple):
    """Why a worker could not read a batch."""

    message: str


def _answers(pool: ProcessPoolExecutor, iterator: Iterator[Any]) -> Iterator[Any]:
    try:
        for answer in iterator:
            if isinstance(answer, _Failed):
                raise UserError(answer.message)
            yield answer
    except BrokenProcessPool as error:
        raise UserError(
            "a process that reads images has ended; if it was killed for want of memory, lower "
            "dataset.workers, or set it to 0 to read in threads"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def on_device(
    batches: Iterable[T], *, ahead: int = 2, put: Callable[[np.ndarray], Any] = jax.device_put
) -> Iterator[T]:
    """The batches with their arrays on the device, sent while those before are worked on.

    Args:
      batches: trees; what is no array in them stays on the host.
      ahead: how many are on the device at a time, with the one in use.
      put: sends an array without waiting for its arrival.
    """
    waiting: deque[T] = deque()
    for batch in batches:
        waiting.append(jax.tree.map(lambda x: put(x) if isinstance(x, np.ndarray) else x, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft()
    yield from waiting


def read_images(source: ImageSource, positions: Sequence[int], *, threads: int = 8) -> np.ndarray:
    """Read the images at some positions, in their order.

    Returns:
      uint8 images_NHWC.
    """
    positions = [int(position) for position in positions]
    at_once = max(1, min(_AT_ONCE, num_batches(len(positions), max(1, threads))))

    def read(number: int) -> np.ndarray:
        some = positions[number * at_once : (number + 1) * at_once]
        return np.stack([source.image(position) for position in some])

    numbers = range(num_batches(len(positions), at_once))
    return np.concatenate(list(read_batches(numbers, read, threads=threads)))


def batches(
    source: ImageSource,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    name: str,
    start: int = 0,
    shuffle: bool = True,
    continuous: bool = False,
    share: tuple[int, int] = (0, 1),
    threads: int = 0,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Read every image once per epoch.

    Args:
      source: the images.
      batch_size: images per batch; the last batch of an epoch has what is left.
      epochs: how often every image is read.
      seed, name: address of the order, see ``epoch_order``; unused without ``shuffle``.
      start: global number of the first batch, to continue where an earlier run stopped.
      shuffle: draw an order per epoch; otherwise the source's own.
      continuous: fill up the last batch of an epoch from the next pass, see
        ``continuous_index``.
      share: (process, processes), see ``share_of``.
      threads, workers, prefetch: see ``read_batches``; they change no batch.
    """
    count = len(source)
    per_epoch = num_batches(count, batch_size)
    in_order = np.arange(count, dtype=np.int32)
    labels_N = source.labels_N

    def read(number: int) -> Batch:
        number = int(number)
        epoch, batch = divmod(number, per_epoch)
        if continuous:
            index_B = continuous_index(
                number, count=count, batch_size=batch_size, seed=seed, name=name
            )
        else:
            order = epoch_order(seed, name, epoch, count) if shuffle else in_order
            index_B = order[batch * batch_size : (batch + 1) * batch_size]
        images_BHWC = np.stack([source.image(int(i)) for i in index_B])
        return Batch(number, epoch, batch, index_B, images_BHWC, labels_N[index_B])

    numbers = share_of(epochs * per_epoch, start, share)
    return read_batches(numbers, read, threads=threads, workers=workers, prefetch=prefetch)
