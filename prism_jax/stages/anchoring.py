"""From real images to anchors, and candidates: cached class by class, apart from recover.

generate/latents/<class>.safetensors      of real images (other anchors keep them)
generate/anchors/<class>.safetensors      with cluster sizes (another strength keeps them)
generate/candidates/<class>.safetensors   generated images that the judge chose, and, where they
                                          are refined, the latents of them
generate/<control>/<class>.safetensors    images of a control
    .../<class>.json                      written after it: the class is done
    .../record.json                       written last: all are
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from prism_jax import parallel, progress
from prism_jax.config import GENERATED_CONTROLS, Generate, batch_layout
from prism_jax.config.generation import clustering_of
from prism_jax.data import weights, workdir
from prism_jax.data.lazy import Images, LazyImages, OneByOne
from prism_jax.data.pipeline import read_images
from prism_jax.data.weights import RECORD, sha256
from prism_jax.diffusion import anchors, generate, pixels, select
from prism_jax.errors import UserError
from prism_jax.stages import fingerprints, generator
from prism_jax.stages.context import Context
from prism_jax.stages.generator import Opened, Painter, Wish
from prism_jax.stages.judging import logits_of
from prism_jax.types import Array, PyTree

Tensors = dict[str, np.ndarray]


class Kept(NamedTuple):
    """What is kept of a class: tensors, and facts for its record."""

    tensors: Tensors
    facts: dict[str, Any]


class Starts(NamedTuple):
    """Where N images start.

    Attributes:
      anchors_NHWC: latents.
      medoids_N: positions among the training images of the real ones nearest to them.
    """

    anchors_NHWC: np.ndarray
    medoids_N: list[int]


# What each folder is made of, in the order they are made.
FINGERPRINTS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "latents": fingerprints.latents,
    "anchors": fingerprints.anchors,
    "candidates": fingerprints.candidates,
    **{
        name: functools.partial(fingerprints.generated_control, name=name)
        for name in GENERATED_CONTROLS
    },
}


def needed(context: Context) -> list[str]:
    """The folders that the experiment reads."""
    g = context.config.generate
    if not generator.wanted(context):
        return []
    found = [] if g.anchors == "none" else ["latents", "anchors"]
    return [*found, *(["candidates"] if g.candidates > 1 else [])]


def painted(context: Context) -> int:
    """The images that a class or a unit wants at once: its candidates, where a judge chooses."""
    g = context.config.generate
    if g.candidates > 1:
        return g.candidates * context.config.recover.ipc
    return batch_layout(context.config).size


def painter(context: Context, opened: Opened) -> Painter:
    """What paints a unit, or a class's candidates: those that are chosen are refined later."""
    g = context.config.generate
    if g.candidates == 1:
        return Painter(context, opened, painted(context))
    refined = bool(g.refine.steps)
    return Painter(context, opened._replace(refining=None), painted(context), keeps=refined)


def controls_of(context: Context) -> list[str]:
    """The folders of controls that the experiment reads."""
    return [name for name in context.config.validate.controls if name in GENERATED_CONTROLS]


def missing(context: Context, names: Sequence[str] | None = None) -> list[str]:
    """The folders that are not there; latents are read for anchors alone.

    Args:
      names: of folders; unset, all that the experiment reads.
    """
    names = [*needed(context), *controls_of(context)] if names is None else names
    left = [name for name in names if not _is_done(context, name)]
    spared = "latents" in left and _is_done(context, "anchors")
    return [name for name in left if not (spared and name == "latents")]


def folder(context: Context, name: str) -> epath.Path:
    return context.root / "generate" / name


def run(context: Context, names: Sequence[str] | None = None) -> None:
    """Make what is missing; every process does its share.

    Args:
      names: of folders; unset, those that recover reads.
    """
    makers = {"latents": _latents, "anchors": _anchors, "candidates": _candidates}
    names = needed(context) if names is None else names
    g = context.config.generate
    for name in missing(context, names):
        make = makers.get(name) or functools.partial(_control, name=name)
        if name != "latents":
            _run(context, name, make)
            continue
        size = g.encode_batch_size or g.batch_size
        with parallel.enough_memory(f"Lower generate.encode_batch_size (now {size} real images)."):
            _run(context, name, make)


def run_controls(context: Context, names: Sequence[str]) -> None:
    """Make the images of these controls, and what they are made of."""
    left = [name for name in names if not _is_done(context, name)]
    before = [name for name in needed(context) if name != "candidates"]
    if left:
        run(context, [*(before if left != ["no_anchors"] else []), *left])


def control_images(context: Context, name: str) -> Images:
    """A control's images, class-major; more than memory may hold are read when they are indexed.

    Raises:
      UserError: they are not there, or damaged.
    """
    if not _is_done(context, name):
        raise UserError(
            f"the images of the control {name} are not in {folder(context, name)}; run the "
            f"recover stage first (--stages=recover,...)"
        )
    classes, ipc = context.config.dataset.num_classes, context.config.recover.ipc

    def read_at(positions_N: np.ndarray) -> np.ndarray:
        of_class = {cls: read(context, name, cls)["images"] for cls in {*(positions_N // ipc)}}
        return np.stack([of_class[at // ipc][at % ipc] for at in positions_N])

    shape = read(context, name, 0)["images"].shape[1:]
    return context.inputs.hold(LazyImages(read_at, (classes * ipc, *shape)))


def read(context: Context, name: str, cls: int) -> Tensors:
    """What is kept of a class.

    Raises:
      UserError: it is damaged.
    """
    root = folder(context, name)
    path = root / f"{cls:05d}.safetensors"
    data = path.read_bytes() if path.exists() else b""
    if sha256(data) != workdir.read_record(root / f"{cls:05d}.json")["sha256"]:
        raise UserError(
            f"{path} is damaged: its content is not what was written. Delete {root} and run the "
            f"same command again to redo it."
        )
    return weights.unpack(data)


def sampled_seconds(context: Context, classes_N: np.ndarray) -> float:
    """Seconds that sampling took of which the images of these classes are the chosen ones."""
    root, seconds = folder(context, "candidates"), 0.0
    for cls, count in zip(*np.unique(classes_N, return_counts=True), strict=True):
        record = workdir.read_record(root / f"{cls:05d}.json")
        seconds += record.get("seconds", 0.0) * count / context.config.recover.ipc
    return seconds


def starts_of(context: Context, classes_N: np.ndarray, slots_N: np.ndarray) -> Starts:
    """The anchors of images, each class's read once."""
    labels_N, ipc = context.inputs.open("train").labels_N, context.config.recover.ipc
    found, positions = {}, {}
    for cls in sorted({*classes_N.tolist()}):
        found[cls] = read(context, "anchors", cls)
        positions[cls] = np.flatnonzero(labels_N == cls)[found[cls]["nearest"]]
    at = list(zip(classes_N.tolist(), (slots_N % ipc).tolist(), strict=True))
    return Starts(
        np.stack([found[cls]["latents"][slot] for cls, slot in at]),
        [int(positions[cls][slot]) for cls, slot in at],
    )


def anchors_of(context: Context, classes_N: np.ndarray, slots_N: np.ndarray) -> np.ndarray | None:
    """Where images start, (N, h, w, c); None where they start from noise alone."""
    if "anchors" not in needed(context):
        return None
    return starts_of(context, classes_N, slots_N).anchors_NHWC


def image_weights(context: Context) -> list[float] | None:
    """Each image's share of its class, times the images of the class (DDOQ); None: alike."""
    if not context.config.generate.weighted:
        return None
    found = []
    for cls in range(context.config.dataset.num_classes):
        sizes_I = read(context, "anchors", cls)["sizes"]
        found += (sizes_I / sizes_I.mean()).tolist()
    return found


def _is_done(context: Context, name: str) -> bool:
    root = folder(context, name)
    done = (root / RECORD).exists() and workdir.fits(root, FINGERPRINTS[name](context))
    return done and not _classes_left(context, root)


def _classes_left(context: Context, root: epath.Path) -> list[int]:
    there = workdir.names(root)
    classes = range(context.config.dataset.num_classes)
    return [cls for cls in classes if f"{cls:05d}.json" not in there]


def _run(context: Context, name: str, maker: Callable[[Context, list[int]], Iterator[Kept]]):
    root, classes = folder(context, name), list(range(context.config.dataset.num_classes))

    def missing() -> list[int]:
        return _classes_left(context, root)

    mine = context.work.deal(
        name, classes, missing, lambda: context.work.begin(root, FINGERPRINTS[name](context))
    )
    with progress.task(name, len(mine), unit="class") as bar:
        for cls, kept in zip(mine, maker(context, mine), strict=True):
            data = weights.pack(kept.tensors)
            workdir.write_bytes(root / f"{cls:05d}.safetensors", data)
            record = {"class": cls, "sha256": sha256(data), **kept.facts}
            workdir.write_record(root / f"{cls:05d}.json", record)
            bar.advance(1)
            context.stop.check()
    if not parallel.is_main():
        context.work.wait(lambda: _is_done(context, name))
        return
    context.work.wait(lambda: not missing())
    workdir.write_record(root / RECORD, {"classes": len(classes)})


# --- what is made of a class ------------------------------------------------------------------


class Encoder:
    """The codec on every device: a batch of real images on each, without a collective."""

    def __init__(self, context: Context, opened: Opened):
        g, channels = context.config.generate, context.inputs.image_shape[2]
        self._shape = opened.image_size, opened.image_size, channels

        def encode(params: PyTree, seed: Array, lane: tuple[Array, Array]) -> Array:
            return generate.encode(
                opened.generator.codec, params, seed, *lane, sampled=g.sampled, flip=g.flip
            )

        self._lanes = parallel.LaneMap(
            encode, opened.weights.codec, arity=1, devices=parallel.devices(),
            how=context.config.parallel.map,
        )  # fmt: skip
        self.encode = self._lanes.stream

    def lower(self, batch: int) -> jax.stages.Lowered:
        """The program of a batch on every device, from shapes alone."""
        images = jax.ShapeDtypeStruct((batch, *self._shape), np.float32)
        return self._lanes.lower_for((jax.ShapeDtypeStruct((batch,), np.int32), images))


def encoded_at_once(g: Generate, most: int | None) -> int:
    """Real images in a batch, the largest class having ``most``, where that is known."""
    return min(n for n in (g.encode_batch_size or g.batch_size, g.most_images, most) if n)


def _latents(context: Context, classes: list[int]) -> Iterator[Kept]:
    if not classes:
        return
    opened, g = generator.open_(context), context.config.generate
    source = context.inputs.open("train")
    members = {c: np.flatnonzero(source.labels_N == c)[: g.most_images] for c in classes}
    # Of all classes, not of those that are missing here: another batch may round otherwise.
    batch = encoded_at_once(g, int(np.bincount(source.labels_N).max()))

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for positions in members.values():
            for at in range(0, len(positions), batch):
                index = np.arange(at, at + batch).clip(max=len(positions) - 1)
                images = real_images(context, opened, positions[index])
                yield positions[index].astype(np.int32), pixels.from_uint8(images)

    results = Encoder(context, opened).encode(context.config.seed, batches())
    for cls, positions in members.items():
        found = [next(results) for _ in range(0, len(positions), batch)]
        latents_NHWC = np.concatenate(found)[: len(positions)]
        if not np.isfinite(latents_NHWC).all():
            raise UserError(
                f"latents of class {cls} are not finite: the codec's weights are damaged, or it "
                f"overflows in generate.dtype={g.dtype}"
            )
        yield Kept({"latents": latents_NHWC}, {"images": len(positions)})


def real_images(context: Context, opened: Opened, positions: np.ndarray) -> np.ndarray:
    """Training images as the codec reads them, uint8 (B, size, size, C)."""
    source, size = context.inputs.open("train"), opened.image_size
    if size == context.config.dataset.image_size and context.config.generate.view == "cropped":
        return read_images(source, positions.tolist(), threads=context.config.dataset.threads)

    def view(at: int) -> np.ndarray:
        image = source.original(at)
        if context.config.generate.view == "cropped":
            image = centre(image)
        return pixels.resize(image[None], size, context.config.generate.resampler)[0]

    threads = context.config.dataset.threads
    return context.once("views", lambda: OneByOne(view, threads=threads))(positions)


def centre(image_HWC: np.ndarray) -> np.ndarray:
    """The largest square in the middle of an image."""
    height, width, _ = image_HWC.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image_HWC[top : top + side, left : left + side]


def _anchors(context: Context, classes: list[int]) -> Iterator[Kept]:
    config, clustering = context.config, clustering_of(context.config.generate)
    for cls in classes:
        found = anchors.anchors(
            clustering, read(context, "latents", cls)["latents"], config.recover.ipc,
            seed=config.seed, cls=cls,
        )  # fmt: skip
        yield Kept(
            {"latents": found.latents_IHWC, "sizes": found.sizes_I, "nearest": found.nearest_I},
            {"sizes": found.sizes_I.tolist()},
        )


def _candidates(context: Context, classes: list[int]) -> Iterator[Kept]:
    if not classes:
        return
    config = context.config
    count, sampler = painted(context), painter(context, generator.open_(context))
    slots = np.arange(count)
    wishes = (
        Wish(np.full(count, cls), slots, anchors_of(context, np.full(count, cls), slots))
        for cls in classes
    )
    started = time.monotonic()
    for cls, found in zip(classes, sampler.paint(wishes), strict=True):
        logits_NK = logits_of(context, config.judge, found.images)
        chosen = select.most_confident(logits_NK, cls, config.recover.ipc)
        facts = {"chosen": chosen.index_S.tolist(), "recognised": chosen.recognised}
        facts["seconds"], started = time.monotonic() - started, time.monotonic()
        tensors = {"images": found.images[chosen.index_S]}
        if found.latents_NHWC is not None:
            tensors["latents"] = found.latents_NHWC[chosen.index_S]
        yield Kept(tensors, facts)


def _control(context: Context, classes: list[int], name: str) -> Iterator[Kept]:
    """Anchors as they are, the real images nearest to them, or images of no anchors."""
    if not classes:
        return
    ipc, source = context.config.recover.ipc, context.inputs.open("train")
    if name == "medoids":
        for cls in classes:
            at = starts_of(context, np.full(ipc, cls), np.arange(ipc)).medoids_N
            threads = context.config.dataset.threads
            yield Kept({"images": read_images(source, at, threads=threads)}, {"positions": at})
        return
    opened = generator.open_(context)
    anchored = name == "decoded_anchors"
    sampling = dataclasses.replace(opened.sampling, strength=float(not anchored), terms=())
    painter = Painter(context, opened._replace(sampling=sampling, refining=None), ipc)
    slots = np.arange(ipc)
    wishes = (
        Wish(cls_N, slots, anchors_of(context, cls_N, slots) if anchored else None)
        for cls_N in (np.full(ipc, cls) for cls in classes)
    )
    for painted in painter.paint(wishes):
        yield Kept({"images": painted.images}, {})
