"""Labels of every view as SRe2L's relabel writes them ("FKD"): one file of PyTorch per batch.

    epoch_<e>/batch_<b>.tar    [coords (B, 4), flips (B,), partner (B,), lambda, box, logits (B, K)]

coords are (top / height, left / width, height / height, width / width) of each crop; partner,
lambda and box are None where nothing is mixed, and box is None for MixUp. Which images a batch has
is not stored: it is the order of PyTorch's RandomSampler over the ImageFolder, with its own
generator for all epochs. G-VBSM and EDC store it, as a seventh part: the images' positions (B,).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prism_jax.data.label_store import LabelPlan
from prism_jax.data.pipeline import num_batches, read_batches, share_of
from prism_jax.data.sets import torch_file
from prism_jax.data.sets.card import card
from prism_jax.data.sets.content import Content
from prism_jax.data.sets.folder import write_images
from prism_jax.errors import UserError
from prism_jax.types import Mix, SoftLabels, View

SEED = 42  # of the reference's sampler
ORDER = "order.pt"  # (epochs, N) integers, beside the folder of the epochs; where it is, it holds
BATCHES = "img2batch_idx_list.tar"

_LEAST_GAIN = 0.1  # by which one order of the images must fit the labels better than another
_ENOUGH_BOXES = 12  # of boxes 0.54 reach an edge of the image: so many do not once in 12,000


# --- the order of PyTorch's RandomSampler -----------------------------------------------------


def torch_orders(count: int, epochs: int, *, seed: int = SEED, draws: int = 2) -> np.ndarray:
    """The permutations that RandomSampler gives, epoch by epoch: int64 (epochs, count).

    torch.randperm exchanges place i with i + (r mod (count - i)), r of a Mersenne Twister that is
    seeded as NumPy's RandomState is.

    Args:
      draws: permutations that are drawn per epoch, of which the first is used: today's
        RandomSampler draws a second one, of which it takes nothing; older ones did not.
    """
    state = np.random.RandomState(seed).get_state(legacy=False)
    bits = np.random.MT19937()
    bits.state = {"bit_generator": "MT19937", "state": state["state"]}
    orders = np.empty((epochs, count), np.int64)
    for epoch in range(epochs):
        for number in range(draws):
            random = bits.random_raw(count - 1) if count > 1 else np.zeros(0, np.uint64)
            if number == 0:
                orders[epoch] = _exchanged(random, count)
    return orders


def _exchanged(random: np.ndarray, count: int) -> np.ndarray:
    places = list(range(count))
    further = (random % (count - np.arange(len(random), dtype=np.uint64))).tolist()
    for i, step in enumerate(further):
        places[i], places[i + step] = places[i + step], places[i]
    return np.array(places, np.int64)


# --- in ---------------------------------------------------------------------------------------


class FkdLabels:
    """Labels in the layout of the reference, read as a ``LabelReader`` is.

    Args:
      path: the folder of the epochs, or one with ``labels`` in it.
      labels_N: the class of each image of our set.
      num_classes: length of a label.
      image_size: side of the images in pixels, to which crops are scaled.
      places_N: the place of each of our images among the files of the ImageFolder that was
        labelled; None: the same.

    Attributes:
      plan: batches and epochs.
      notes: what a person should know of how they were read.

    Raises:
      UserError: they are not there, not whole, of another set, or in an order that cannot be told.
    """

    def __init__(
        self,
        path: str,
        *,
        labels_N: np.ndarray,
        num_classes: int,
        image_size: int,
        places_N: np.ndarray | None = None,
    ):
        self._root, self._size = _root(path), image_size
        count = len(labels_N)
        batches = self._layout(count)
        logits = self._load(0, 0)[5]
        if logits.ndim != 2 or logits.shape[1] != num_classes:
            raise UserError(
                f"the labels in {self._root} have shape {logits.shape}; the data has {num_classes} "
                "classes, and a label has one number for each"
            )
        size = len(logits)
        if num_batches(count, size) != batches:
            raise UserError(
                f"{self._root} has {batches} batches of {size} images in an epoch; the set has "
                f"{count}: these are labels of another set, or of another recover.ipc"
            )
        self.plan = LabelPlan(count, num_classes, size, self._epochs, "float32")
        places = np.arange(count) if places_N is None else np.asarray(places_N)
        if sorted(places.tolist()) != list(range(count)):
            raise UserError(
                f"{self._root} labels a whole set; recover.ipc takes a part of it: take all of it"
            )
        self._ours = np.argsort(places)  # our position of each of their images
        self._orders, self.notes = self._found_order(np.asarray(labels_N))

    def __len__(self) -> int:
        return self.plan.epochs * self.plan.batches_per_epoch

    def __getitem__(self, number: int) -> SoftLabels:
        epoch, batch = divmod(int(number), self.plan.batches_per_epoch)
        return self._record(epoch, batch, self._orders[epoch])

    def read(
        self,
        *,
        start: int = 0,
        epochs: int | None = None,
        share: tuple[int, int] = (0, 1),
        threads: int = 1,
    ) -> Iterator[SoftLabels]:
        """As ``LabelReader.read``."""
        total = len(self) if epochs is None else epochs * self.plan.batches_per_epoch
        numbers = share_of(total, start, share)
        return read_batches(numbers, lambda number: self[int(number) % len(self)], threads=threads)

    def _record(self, epoch: int, batch: int, order_N: np.ndarray | None) -> SoftLabels:
        coords, flips, partner, lam, box, logits, *stated = self._load(epoch, batch)
        size = self.plan.batch_size
        at_B = stated[0] if order_N is None else order_N[batch * size : (batch + 1) * size]
        if at_B.ndim != 1 or not ((at_B >= 0) & (at_B < self.plan.count)).all():
            raise UserError(
                f"{self._file(epoch, batch)} has positions of other images than the "
                f"{self.plan.count} of the set"
            )
        index_B = self._ours[at_B.astype(np.int64)].astype(np.int32)
        count = len(index_B)
        if len(logits) != count or coords.shape != (count, 4) or len(flips) != count:
            raise UserError(
                f"{self._file(epoch, batch)} labels {len(logits)} images; at its place are {count}"
            )
        # A crop is of whole pixels, written as fractions of the side in float32.
        crop = np.rint(np.asarray(coords, np.float64) * self._size).astype(np.float32)
        view = View(crop, np.asarray(flips, bool), np.zeros((count, 2), np.int32))
        shown = view, _mix(partner, lam, box, count, self._size)
        return SoftLabels(epoch, batch, index_B, np.asarray(logits, np.float32), shown)

    def _layout(self, count: int) -> int:
        """Batches per epoch of whole epochs."""
        epochs = _numbered(self._root, "epoch_", "")
        self._epochs = len(epochs)
        if not epochs or epochs != list(range(len(epochs))):
            raise UserError(
                f"{self._root} has no epoch_0, epoch_1, ... without a gap, as FKD labels have"
            )
        batches = [
            _numbered(os.path.join(self._root, f"epoch_{e}"), "batch_", ".tar") for e in epochs
        ]
        for epoch, numbers in enumerate(batches):
            if numbers != list(range(len(batches[0]))) or not numbers:
                missing = min(set(range(len(batches[0]))) - set(numbers), default=0)
                raise UserError(
                    f"{self._file(epoch, missing)} is missing, or more than there should be; get "
                    "whole labels"
                )
        return len(batches[0])

    def _file(self, epoch: int, batch: int) -> str:
        return os.path.join(self._root, f"epoch_{epoch}", f"batch_{batch}.tar")

    def _load(self, epoch: int, batch: int) -> list[Any]:
        file = self._file(epoch, batch)
        found = torch_file.load(file)
        if not isinstance(found, (list, tuple)) or len(found) not in (6, 7):
            raise UserError(
                f"{file} is no batch of FKD labels: they are lists of six, as SRe2L's, or of "
                f"seven with the images' positions, as G-VBSM's and EDC's"
            )
        if not all(isinstance(found[i], np.ndarray) for i in (0, 1, 5, *range(6, len(found)))):
            raise UserError(
                f"{file} is no batch of FKD labels: crops, flips, logits and positions are tensors"
            )
        return list(found)

    def _found_order(self, labels_N: np.ndarray) -> tuple[list[np.ndarray | None], tuple[str, ...]]:
        """The order in which the images were labelled, by how well labels and classes agree.

        Of each epoch; None where its own batches say it.
        """
        count, epochs = self.plan.count, self._epochs
        beside = _beside(self._root)
        stated = os.path.isfile(beside)
        if len(self._load(0, 0)) == 7:
            within: list[np.ndarray | None] = [None] * epochs
            fit = self._agreement(within, labels_N)
            return within, (_fit("the positions stored with them", fit),)
        if stated:
            readings = {ORDER: _stated_order(beside, epochs, count)}
        else:
            readings = {
                f"{words} RandomSampler": torch_orders(count, epochs, draws=draws)
                for words, draws in (("today's", 2), ("an older", 1))
            }
        fits = {name: self._agreement([*orders], labels_N) for name, orders in readings.items()}
        (best, fit), *rest = sorted(fits.items(), key=lambda item: -item[1])
        chance = 2 / self.plan.num_classes
        same = all(np.array_equal(readings[best], readings[other]) for other, _ in rest)
        said = "; ".join(f"{name}: {share:.0%}" for name, share in fits.items())
        clear = same or fit - rest[0][1] >= _LEAST_GAIN
        if not stated and (not clear or fit < min(chance + _LEAST_GAIN, 0.9)):
            raise UserError(
                f"the order in which the images of {self._root} were labelled is not known: labels "
                f"agree with the class of their image, or of the one mixed in, for {said} (chance "
                f"is about {chance:.0%}). These are labels of other images, or in another order: "
                f"state it in {beside}, a tensor of integers (epochs, images) with the positions "
                f"in the ImageFolder in the order of the batches"
            )
        return list(readings[best]), (_fit(best, fit),)

    def _agreement(self, orders: Sequence[np.ndarray | None], labels_N: np.ndarray) -> float:
        """The share of images whose label's largest class is theirs or their partner's."""
        hits, tried, edges = 0, 0, []
        for epoch in range(min(1, self._epochs - 1), min(4, self._epochs)):
            for batch in range(min(self.plan.batches_per_epoch, 20)):
                record = self._record(epoch, batch, orders[epoch])
                assert record.shown is not None
                own_B = labels_N[record.index_B]
                partner_B = own_B[record.shown[1].partner_B]
                largest_B = record.logits_BK.argmax(1)
                hits += int(((largest_B == own_B) | (largest_B == partner_B)).sum())
                tried += len(own_B)
                if record.shown[1].box.any():
                    edges.append(int(record.shown[1].box.max()))
        if len(edges) >= _ENOUGH_BOXES and max(edges) < self._size:
            raise UserError(
                f"no box of the mixes in {self._root} reaches beyond pixel {max(edges)}, and "
                f"dataset.image_size is {self._size}: they were made for images of "
                f"{max(edges)} px; set dataset.image_size={max(edges)}"
            )
        return hits / tried


def _fit(order: str, share: float) -> str:
    return f"the labels agree with the classes of their images for {share:.0%} ({order})"


def digest(path: str) -> str:
    """What identifies FKD labels: names and sizes of files, first batches, a stated order."""
    sha, root = hashlib.sha256(), _root(path)
    for epoch in _numbered(root, "epoch_", ""):
        folder = os.path.join(root, f"epoch_{epoch}")
        for batch in _numbered(folder, "batch_", ".tar"):
            size = os.path.getsize(os.path.join(folder, f"batch_{batch}.tar"))
            sha.update(f"{epoch} {batch} {size}\n".encode())
        with open(os.path.join(folder, "batch_0.tar"), "rb") as file:
            sha.update(file.read())
    if os.path.isfile(order := _beside(root)):
        with open(order, "rb") as file:
            sha.update(file.read())
    return sha.hexdigest()


def _root(path: str) -> str:
    """The folder of the epochs.

    Raises:
      UserError: there is none.
    """
    for root in (path, os.path.join(path, "labels")):
        if os.path.isdir(os.path.join(root, "epoch_0")):
            return os.path.abspath(root)
    raise UserError(
        f"{path} has no folder epoch_0; relabel.labels_from takes a folder of FKD labels, "
        "epoch_0/batch_0.tar and so on, as SRe2L's relabel writes them, or the word set"
    )


def _beside(root: str) -> str:
    """Where the order of the images is stated, if it is: next to the folder of the epochs."""
    return os.path.join(os.path.dirname(root), ORDER)


def _stated_order(file: str, epochs: int, count: int) -> np.ndarray:
    """The order that a file states: int64 (epochs, count).

    Raises:
      UserError: it does not give every image one place in every epoch.
    """
    orders = torch_file.load(file)
    kind = type(orders).__name__
    if isinstance(orders, np.ndarray):
        kind = f"a tensor of type {orders.dtype} and shape {orders.shape}"
        if orders.dtype.kind in "iu" and orders.shape == (epochs, count):
            wrong = np.flatnonzero((np.sort(orders, 1) != np.arange(count)).any(1))
            if not len(wrong):
                return orders.astype(np.int64)
            kind = f"one whose epoch {wrong[0]} repeats or lacks positions"
    raise UserError(
        f"{file} must be a tensor of integers of shape {(epochs, count)}, in each row every "
        f"position from 0 to {count - 1} once; it holds {kind}. Write it anew, or delete it if the "
        "batches are in the order of PyTorch's RandomSampler"
    )


def _numbered(folder: str, before: str, after: str) -> list[int]:
    """The numbers in the names of a folder's entries, sorted."""
    names = os.listdir(folder)
    middles = [
        n[len(before) : len(n) - len(after)]
        for n in names
        if n.startswith(before) and n.endswith(after)
    ]
    return sorted(int(middle) for middle in middles if middle.isdecimal())


def _mix(partner: Any, lam: Any, box: Any, count: int, size: int) -> Mix:
    """One mix per image; ``box`` is (top, left, bottom, right)."""
    ones = np.ones(count, np.float32)
    boxes = np.zeros((count, 4), np.int32)
    if partner is None:
        return Mix(np.arange(count, dtype=np.int32), boxes, ones, ones)
    partner_B = np.asarray(partner).astype(np.int32)
    if box is None:
        return Mix(partner_B, boxes, ones * np.float32(lam), ones * np.float32(lam))
    top, left, bottom, right = (int(n) for n in box)
    if max(bottom, right) > size:
        raise UserError(
            f"FKD labels mix a box up to pixel {max(bottom, right)}; they were made for images "
            f"larger than dataset.image_size={size}"
        )
    boxes[:] = top, left, bottom, right
    kept = 1 - (bottom - top) * (right - left) / size**2
    return Mix(partner_B, boxes, ones * np.float32(kept), ones)


# --- out --------------------------------------------------------------------------------------


_READING = """`images` is the ImageFolder of the set and `labels` the FKD labels of its views:

    train_FKD.py --train-dir=DIR/images --fkd-path=DIR/labels/ --batch-size={size} --epochs={epochs}
"""
_OWN_ORDER = f"""
The batches are not in the order of PyTorch's RandomSampler: `{ORDER}` has theirs,
(epochs, images). Two lines of the reference read it, the first where it makes its sampler, the
second where it makes `img2batch_idx_list`:

    sampler = [int(i) for i in torch.load("DIR/{ORDER}")[epoch]]  # of each epoch
    self.img2batch_idx_list = torch.load("DIR/{BATCHES}")"""


def write(folder: str, content: Content) -> None:
    """Images, labels, and the order of the batches.

    Raises:
      UserError: there are no stored labels, or their views cannot be written so.
    """
    reader = content.reader
    if reader is None:
        raise UserError("--format=fkd needs stored soft labels of every view; this run has none")
    if content.weights_N is not None:
        raise UserError(
            "the images of this set count differently (generate.weighted), which FKD labels have "
            "no place for; --format=parquet keeps it"
        )
    view = reader.manifest["view"]
    for field, only in (("crop_pad", None), ("patch_shuffle", 1), ("mix_per", "batch")):
        if view.get(field, only) != only and not (field == "mix_per" and view["mix"] == "none"):
            raise UserError(
                f"relabel.{field} was {view[field]!r}, which FKD labels have no place for; they "
                "hold one resized crop and flip per image and one mix per batch"
            )
    write_images(os.path.join(folder, "images"), content)
    height, width = content.images_NHWC.shape[1:3]
    sides = np.array([height, width, height, width], np.float32)
    half = reader.plan.precision == "float16"
    orders = np.empty((reader.plan.epochs, reader.plan.count), np.int64)
    size = reader.plan.batch_size
    for record in reader.read():
        shown, mix = content.drawn(record)
        mixed = view["mix"] != "none"
        batch = [
            (shown.crop / sides).astype(np.float32),
            np.asarray(shown.flip, bool),
            mix.partner_B.astype(np.int64) if mixed else None,
            float(mix.weight) if mixed else None,
            [int(n) for n in mix.box] if view["mix"] == "cutmix" else None,
            record.logits_BK.astype(np.float16 if half else np.float32),
        ]
        at = os.path.join(folder, "labels", f"epoch_{record.epoch}")
        os.makedirs(at, exist_ok=True)
        torch_file.save(os.path.join(at, f"batch_{record.batch}.tar"), batch)
        first = record.batch * size
        orders[record.epoch, first : first + len(record.index_B)] = record.index_B
    torch_file.save(os.path.join(folder, ORDER), orders)
    firsts = [{int(order[i]): i // size for i in range(0, len(order), size)} for order in orders]
    torch_file.save(os.path.join(folder, BATCHES), firsts)
    reading = _READING.format(size=size, epochs=reader.plan.epochs)
    if view.get("order", "own") == "own":
        reading += _OWN_ORDER
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(card(content, reading))
