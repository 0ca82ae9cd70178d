"""The generator: trained by squeeze like a network, or read from a directory.

squeeze/generator/
    weights.safetensors   codec and denoiser, where they were trained here
    prompts/              the classes' states, where it reads prompts
    checkpoints/  metrics.jsonl   of a training
    record.json           written last: done
    quality.json          what images without anchors are worth, and how those were sampled
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from prism_jax import parallel, progress
from prism_jax.config import Generate
from prism_jax.config.generation import (
    FOLDER,
    SCHEDULES,
    fitting_of,
    refining_of,
    sampling_of,
)
from prism_jax.data import workdir
from prism_jax.data.checkpoints import Checkpoints
from prism_jax.data.lazy import chunks
from prism_jax.data.metrics import MetricsWriter, truncate
from prism_jax.data.weights import RECORD, WEIGHTS, pack, sha256, unpack
from prism_jax.diffusion import (
    anchors,
    dit,
    fit,
    generate,
    huggingface,
    patches,
    pixels,
    prompts,
    quality,
    samplers,
)
from prism_jax.diffusion.generate import Generator, Places, Weights
from prism_jax.diffusion.protocols import Codec
from prism_jax.diffusion.refine import Refining
from prism_jax.diffusion.unet import UNet2DCondition
from prism_jax.errors import UserError
from prism_jax.stages import fingerprints
from prism_jax.stages.context import Context
from prism_jax.stages.judging import logits_of
from prism_jax.stages.squeeze import refusal
from prism_jax.types import Array, PyTree

MEASURED = 1000  # images that the quality of a trained generator is measured on
TESTED = 2000  # test images at most, evenly spaced, that they are compared with
QUALITY, QUALITIES = "quality.json", ("judge", "recognised", "distance", "near")


class Opened(NamedTuple):
    """A generator that is ready, and how it counts.

    Attributes:
      generator: its networks; ``weights``, theirs.
      sampling: how images are sampled.
      refining: how their latents are refined; None, or no steps: they are not.
      labels_K: what the condition calls each class.
      latent_shape: of one image.
      image_size: side of the images that the codec reads and makes.
    """

    generator: Generator
    weights: Weights
    sampling: samplers.Sampling
    refining: Refining | None
    labels_K: np.ndarray
    latent_shape: tuple[int, int, int]
    image_size: int


def wanted(context: Context) -> bool:
    """Whether the experiment generates its images."""
    return context.config.recover.maker == "generate"


def folder(context: Context) -> epath.Path:
    return context.root / "squeeze" / FOLDER


def is_done(context: Context) -> bool:
    """Whether it is there.

    Raises:
      UserError: it is, but was made from something else.
    """
    root = folder(context)
    found = workdir.read_fingerprint(root)
    if found is None:
        return False
    if lines := workdir.differences(found, fingerprints.generator(context)):
        raise UserError(refusal("the generator", root, lines))
    return (root / RECORD).exists()


def check(context: Context) -> None:
    """Refuse, before any work, what the data does not allow, and a generator of other settings.

    Raises:
      UserError: files that are not there or do not fit together, classes with too few images for
        their anchors, images of other channels than the codec's, more components than a patch has
        numbers, more guided channels than latents have.
    """
    config, g = context.config, context.config.generate
    if lines := missing(context):
        raise UserError("the generator cannot be read: " + "; ".join(lines))
    labels_N = context.inputs.open("train").labels_N
    counts_K = np.bincount(labels_N, minlength=config.dataset.num_classes)
    least = int(min(counts_K.min(), g.most_images or counts_K.max()))
    least = anchors.fewest_inliers(least, g.outliers)
    if g.anchors != "none" and config.recover.ipc > least:
        raise UserError(
            f"recover.ipc is {config.recover.ipc}, and class {counts_K.argmin()} has {least} "
            f"training images to find anchors among; lower it, or set generate.anchors='none' "
            f"and generate.strength=1"
        )
    if g.anchors == "chunked_released" and g.expand * config.recover.ipc > least:
        raise UserError(
            f"generate.anchors='chunked_released' needs {g.expand * config.recover.ipc} images of "
            f"every class (generate.expand={g.expand} x recover.ipc={config.recover.ipc}), and "
            f"class {counts_K.argmin()} has {least}; lower either, or use 'chunked'"
        )
    channels = context.inputs.image_shape[2]
    if g.codec == "directory" and channels != 3:
        raise UserError(
            f"{config.dataset.name} has images of {channels} channel(s), and the autoencoder of "
            f"{g.directory} reads three; choose generate.generator='dit', which is trained here"
        )
    if g.codec == "patches" and g.components > g.patch**2 * channels:
        raise UserError(
            f"generate.components is {g.components}, and patches of generate.patch={g.patch} have "
            f"{g.patch**2 * channels} numbers; choose at most so many"
        )
    latent = channels if g.codec == "none" else g.components
    if g.generator == "dit" and (g.guided_channels or 0) > latent:
        raise UserError(_too_many(g, latent))
    done = is_done(context)
    if g.generator == "dit" or (done and _made(context)):
        return
    _check_forms(context)
    if g.generator == "stable_diffusion" and not (
        done or context.offers(f"squeeze/{FOLDER}", fingerprints.generator(context))
    ):  # else what prompts say is kept
        _check_prompts(context)


def _too_many(g: Generate, channels: int) -> str:
    return (
        f"generate.guided_channels is {g.guided_channels}, and the latents have {channels} "
        f"channel(s); choose at most so many, or leave it unset for all"
    )


def _check_forms(context: Context) -> None:
    """Refuse, by what the configs of released networks say, those that do not fit together.

    Raises:
      UserError: another network, latents that it does not read, other classes, steps that its noise
        does not have, a variance that is not returned, or more guided channels than there are.
    """
    g = context.config.generate
    part = "unet" if g.generator == "stable_diffusion" else "transformer"
    path = fingerprints.part_path(context, part)
    vae, codec = huggingface.formed(fingerprints.part_path(context, "vae"), "vae")
    denoiser, params = huggingface.formed(path, part)
    if part == "transformer":
        _imagenet_labels(context, denoiser.classes)
    elif (texts := _texts(context)).width != denoiser.context:
        raise UserError(
            f"the text encoder in {g.directory} gives states of {texts.width} numbers, and its "
            f"U-Net reads {denoiser.context}: they are of different models; download them again"
        )
    if vae.latent_channels != denoiser.channels:
        raise UserError(
            f"the autoencoder in {g.directory} makes latents of {vae.latent_channels} channels, "
            f"and the {part} in {path} reads {denoiser.channels}: they are of different models; "
            f"download them again"
        )
    samplers.check(sampling_of(g, huggingface.schedule(str(g.directory), SCHEDULES[g.generator])))
    size = g.image_size or context.config.dataset.image_size
    _, *told = huggingface.PARTS[part].arguments(denoiser)
    try:
        shape = latent_shape(vae, codec, size, 3)
        noisy = jax.ShapeDtypeStruct((1, *shape), np.float32)
        with _reading(shape):
            returned = jax.eval_shape(denoiser.predict, params, noisy, *told).shape[-1]
    except UserError as error:
        raise UserError(f"generate.image_size is {size}: {error}") from None
    _check_channels(g, returned, shape[-1])
    trained = huggingface.sample_size(path, part)
    if trained not in (None, shape[0]):
        warnings.warn(
            f"the denoiser in {path} was trained on latents of {trained} x {trained}, and "
            f"generate.image_size={size} gives it {shape[0]} x {shape[1]}",
            stacklevel=2,
        )


def _check_prompts(context: Context) -> None:
    """Refuse prompts that cannot be cut into tokens, or not into such as the encoder reads."""
    g = context.config.generate
    said = prompts.of_classes(context.inputs.spoken_names, g.template)
    prompts.tokenise(str(g.directory), [*said, g.negative], _texts(context))


def _texts(context: Context) -> Any:
    """The form of the text encoder."""
    part = "text_encoder"
    return huggingface.formed(fingerprints.part_path(context, part), part)[0]


def _check_channels(g: Generate, returned: int, channels: int) -> None:
    """Refuse a variance that is not returned, and more guided channels than there are."""
    if g.variance == "learned" and returned != 2 * channels:
        raise UserError(
            f"generate.variance is 'learned', but the denoiser in {g.directory} returns {returned} "
            f"channels for latents of {channels}: it learned none; allowed for it: small, large"
        )
    if (g.guided_channels or 0) > channels:
        raise UserError(_too_many(g, channels))


def missing(context: Context) -> list[str]:
    """What it is read from and is not there, a line each; with its images made, it is not read."""
    g = context.config.generate
    if g.generator == "dit":
        return []
    looks: list[Callable[[], Any]] = []
    if not ((folder(context) / RECORD).exists() and _made(context)):
        looks += [
            functools.partial(huggingface.check_there, fingerprints.part_path(context, part), part)
            for part in fingerprints.generator_parts(context)
        ]
        if g.generator == "stable_diffusion":
            looks.append(lambda: prompts.tokenizer_folder(str(g.directory)))
    if g.generator == "stable_diffusion":
        looks.append(lambda: prompts.of_classes(context.inputs.spoken_names, g.template))
    found = []
    for look in looks:
        try:
            look()
        except UserError as error:
            found.append(str(error))
    return found


def _made(context: Context) -> bool:
    """Whether the images are there, after which it is read no more."""
    return (context.root / "recover" / "manifest.json").exists()


def run(context: Context) -> None:
    """Train it, or read it and find it whole; one process' work."""
    root = folder(context)

    def prepare() -> None:
        context.work.begin(root, fingerprints.generator(context))

    def missing() -> list[str]:
        return [] if is_done(context) else [FOLDER]

    if context.work.deal(FOLDER, [FOLDER], missing, prepare):
        trained = context.config.generate.generator == "dit"
        record = _train(context, root) if trained else _read(context, root)
        workdir.write_record(root / RECORD, record)
    context.work.wait(lambda: is_done(context))


def open_(context: Context) -> Opened:
    """The finished generator.

    Raises:
      UserError: it is not there, or damaged.
    """
    root, g = folder(context), context.config.generate
    if not is_done(context):
        raise UserError(
            f"there is no generator in {root}; run the squeeze stage first (--stages=squeeze,...)"
        )
    record = workdir.read_record(root / RECORD)
    if g.generator != "dit":
        return _released(context, root)
    data = (root / WEIGHTS).read_bytes() if (root / WEIGHTS).exists() else b""
    if sha256(data) != record["sha256"]:
        raise UserError(
            f"{root / WEIGHTS} is damaged: its content is not what squeeze wrote. Delete {root} "
            f"and run the same command again; only the generator is redone."
        )
    return small(context, unpack(data))


def described(context: Context) -> Opened:
    """The generator by shapes alone: no weights, no data.

    One that is read has the form that its directory tells, the published one where that is not
    there.

    Raises:
      UserError: the directory tells another form than those that are implemented.
    """
    config, g = context.config, context.config.generate
    if g.generator == "dit":
        codec, size = codec_shapes(context), config.dataset.image_size
        shape = latent_shape(codec_of(g), codec, size, context.inputs.image_shape[2])
        module = module_of(g, config.dataset.num_classes, shape[-1])
        state = jax.eval_shape(lambda: fit.initial_state(module, fitting_of(g), 0, shape))
        return small(context, {"codec": codec, "denoiser": state.average})

    def shapes(part: str) -> tuple[Any, PyTree]:
        module = huggingface.planned(fingerprints.part_path(context, part), part)
        return module, huggingface.shapes(part, module)

    def labels(classes: int) -> np.ndarray:
        return np.zeros(config.dataset.num_classes, np.int32)

    def states(denoiser: UNet2DCondition) -> PyTree:
        tokens = shapes("text_encoder")[0].length
        null = jax.ShapeDtypeStruct((tokens, denoiser.context), np.float32)
        return {"texts": parallel.shape_of(null, (config.dataset.num_classes,)), "null": null}

    return _assembled(context, shapes, states, labels)


# --- read from a directory --------------------------------------------------------------------


def _released(context: Context, root: epath.Path) -> Opened:
    """Stable Diffusion or a DiT, and its autoencoder."""
    g = context.config.generate
    directory = g.directory
    assert directory is not None  # config.rules

    def load(part: str) -> tuple[Any, PyTree]:
        return huggingface.load(fingerprints.part_path(context, part), part)[:2]

    def states(denoiser: UNet2DCondition) -> PyTree:
        said = prompts.of_classes(context.inputs.spoken_names, g.template)
        return prompts.conditions(root / "prompts", directory, said, g.negative)

    return _assembled(context, load, states, functools.partial(_imagenet_labels, context))


def _assembled(
    context: Context,
    part_of: Callable[[str], tuple[Any, PyTree]],
    states_of: Callable[[UNet2DCondition], PyTree],
    labels_of: Callable[[int], np.ndarray],
) -> Opened:
    """A released generator of its parts, or of their shapes.

    Args:
      part_of: a part's module and parameters, by its name.
      states_of: what the classes' prompts say to a U-Net.
      labels_of: what a transformer of so many classes calls the data set's.
    """
    g, dtype = context.config.generate, jnp.dtype(context.config.generate.dtype)
    assert g.directory is not None  # config.rules
    module, params = part_of("vae")
    codec = module.clone(dtype=dtype)
    labels_K = np.arange(context.config.dataset.num_classes, dtype=np.int32)
    condition: Any
    told: PyTree = {}
    if g.generator == "stable_diffusion":
        module, denoised = part_of("unet")
        denoiser, condition = module.clone(dtype=dtype), prompts.TextCondition()
        told = states_of(module)
    else:
        module, denoised = part_of("transformer")
        denoiser = condition = module.clone(dtype=dtype)
        labels_K = labels_of(module.classes)
    size = g.image_size or context.config.dataset.image_size
    schedule = huggingface.schedule(g.directory, SCHEDULES[g.generator])
    sampling = sampling_of(g, schedule)
    samplers.check(sampling)  # config.rules has, but for what the directory says of its noise
    weights = Weights(params, denoised, told)
    shape = latent_shape(codec, params, size, 3)
    generator = Generator(codec, denoiser, condition)
    _check_channels(g, _check_whole(generator, weights, shape), shape[-1])
    refining = refining_of(g, schedule)
    return Opened(generator, weights, sampling, refining, labels_K, shape, size)


def _imagenet_labels(context: Context, classes: int) -> np.ndarray:
    """What a DiT of ImageNet's classes calls the data set's."""
    source = context.inputs.open("train")
    known, wanted = source.imagenet_indices, context.config.dataset.num_classes
    if classes == 1000 and known is not None:  # first: all of them may be in another order
        return np.array(known, np.int32)
    if classes == wanted and (classes != 1000 or source.class_names is None):
        return np.arange(wanted, dtype=np.int32)
    raise UserError(
        f"the transformer knows {classes} classes and the data has {wanted}, and which of them "
        f"they are is not known (class folders named by WordNet IDs would tell it)"
    )


def _check_whole(generator: Generator, weights: Weights, shape: tuple[int, int, int]) -> int:
    """Refuse latents that the denoiser does not read, by shapes alone; the channels it returns."""
    noisy, label = jax.ShapeDtypeStruct((1, *shape), np.float32), np.zeros(1, np.int32)

    def once(weights: Weights, noisy: Array) -> Array:
        condition = generator.condition.of_labels(weights.condition, jnp.asarray(label))
        return generator.denoiser.predict(weights.denoiser, noisy, jnp.zeros(1), condition)

    with _reading(shape):
        return jax.eval_shape(once, weights, noisy).shape[-1]


@contextlib.contextmanager
def _reading(shape: tuple[int, int, int]) -> Iterator[None]:
    """Say of a failure that a denoiser does not read latents of a shape."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # flax raises several kinds
        raise UserError(
            f"the denoiser does not read latents of {shape[0]} x {shape[1]} x {shape[2]} "
            f"({type(error).__name__}); set generate.image_size to the size it was trained at"
        ) from error


def latent_shape(codec: Codec, params: PyTree, size: int, channels: int) -> tuple[int, int, int]:
    """Of one image, by shapes alone."""
    image = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
    height, width, features = jax.eval_shape(codec.encode, params, image)[0].shape[1:]
    return height, width, features


def _read(context: Context, root: epath.Path) -> dict[str, Any]:
    """See that a directory's parts are whole, and keep what the classes' prompts say."""
    started = time.monotonic()
    opened = _released(context, root)
    return {
        "source": context.config.generate.generator,
        "params": _count(opened.weights.denoiser),
        "latent": list(opened.latent_shape),
        "seconds": time.monotonic() - started,
    }


def _count(params: PyTree) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))


# --- trained here -----------------------------------------------------------------------------


def module_of(g: Generate, classes: int, channels: int) -> dit.DiT:
    """The small transformer."""
    return dit.DiT(
        classes=classes, channels=channels, patch=g.denoiser.token, width=g.denoiser.width,
        depth=g.denoiser.depth, heads=g.denoiser.heads, learned_variance=False, time_scale=1000.0,
        dtype=jnp.dtype(g.dtype),
    )  # fmt: skip


def codec_of(g: Generate) -> Codec:
    return patches.Patches(g.patch) if g.codec == "patches" else patches.Pixels()


def codec_shapes(context: Context) -> PyTree:
    """The shapes of the codec's parameters, without data."""
    g, size, channels = context.config.generate, *context.inputs.image_shape[1:]
    blank = np.zeros((2, size, size, channels), np.uint8)
    params = patches.fit_pixels(blank)
    if g.codec == "patches":
        params = patches.fit_patches(blank, g.patch, g.components)
        params.pop("kept")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def small(context: Context, tree: PyTree) -> Opened:
    """The generator of trained weights."""
    config, g = context.config, context.config.generate
    size, _, channels = context.inputs.image_shape
    codec = codec_of(g)
    shape = latent_shape(codec, tree["codec"], size, channels)
    module = module_of(g, config.dataset.num_classes, shape[-1])
    bounds = patches.bounds(tree["codec"]) if g.clip else None
    return Opened(
        Generator(codec, module, module),
        Weights(tree["codec"], tree["denoiser"], {}, bounds),
        sampling_of(g, SCHEDULES["dit"]),
        refining_of(g, SCHEDULES["dit"]),
        np.arange(config.dataset.num_classes, dtype=np.int32),
        shape,
        size,
    )


def _train(context: Context, root: epath.Path) -> dict[str, Any]:
    """Fit the codec, train the denoiser on the latents, and measure what it makes."""
    config, g = context.config, context.config.generate
    source = context.inputs.open("train")
    images, labels_N = context.inputs.read(source), np.asarray(source.labels_N, np.int32)
    held = images[:]
    codec = codec_of(g)
    if g.codec == "patches":
        params = patches.fit_patches(held, g.patch, g.components)
        params.pop("kept")
    else:
        params = patches.fit_pixels(held)
    encode = jax.jit(lambda params, images: codec.encode(params, images)[0])
    latents_NHWC = np.concatenate(
        [np.asarray(encode(params, pixels.from_uint8(held[at]))) for at in chunks(len(held))]
    )
    module = module_of(g, config.dataset.num_classes, latents_NHWC.shape[-1])
    state, loss, seconds = _fit(context, root, module, latents_NHWC, labels_N)
    tree = jax.device_get({"codec": params, "denoiser": state.average})
    data = pack(tree)
    workdir.write_bytes(root / WEIGHTS, data)
    context.say(f"generator: loss {loss:.3g}")
    return {
        "source": "train",
        "params": _count(tree["denoiser"]),
        "latent": list(latents_NHWC.shape[1:]),
        "loss": loss,
        "seconds": seconds,
        "sha256": sha256(data),
    }


def _fit(
    context: Context, root: epath.Path, module: dit.DiT, latents: np.ndarray, labels: np.ndarray
) -> tuple[fit.FitState, float, float]:
    """The trained state, the mean of its last losses, and the seconds that it took."""
    fitting, seed = fitting_of(context.config.generate), context.config.squeeze.seed
    checkpoints = Checkpoints(
        root / "checkpoints",
        every_seconds=context.config.recover.checkpoint_seconds,
        of=workdir.read_fingerprint(root),
    )
    now, seconds = fit.Progress(fit.initial_state(module, fitting, seed, latents.shape[1:])), 0.0
    if restored := checkpoints.restore(jax.device_get(now.state)):
        done, state, meta = restored
        mean = float("nan") if meta["mean"] is None else meta["mean"]
        seconds, now = meta["seconds"], fit.Progress(state, tuple(meta["losses"]), mean)
        context.say(f"generator: continues after step {done} of {fitting.steps}")
    began, first = time.monotonic(), int(now.state.step)
    metrics = root / "metrics.jsonl"
    truncate(metrics, lambda line: line["step"] <= first)
    writer = MetricsWriter(metrics, tensorboard_dir=root / "tensorboard")

    def save(number: int) -> None:
        writer.flush()
        if now.losses:
            fit.mean_loss(fitting, number, now.losses)  # what is saved goes on
        found = [float(loss) for loss in jax.device_get(now.losses)]
        meta = {"losses": found, "mean": None if np.isnan(now.mean) else now.mean}
        meta["seconds"] = seconds + time.monotonic() - began
        checkpoints.save(number, now.state, meta)

    with progress.task("generator", fitting.steps, unit="step", done=first) as bar:
        steps = fit.fit(module, fitting, latents, labels, seed=seed, begun=now)
        for number, now in enumerate(steps, first + 1):
            shown = {}
            if not now.losses:
                shown = {"loss": now.mean}
                writer.write(number, loss=now.mean)
            bar.advance(1, **shown)
            if context.stop.requested or (checkpoints.due and number < fitting.steps):
                save(number)
                if context.stop.requested:
                    checkpoints.close()
                    context.stop.check()
    writer.close()
    save(fitting.steps)
    checkpoints.close()
    return now.state, now.mean, seconds + time.monotonic() - began


def quality_of(context: Context) -> dict[str, Any] | None:
    """What images without anchors are worth as they are sampled now; None: it is not known."""
    path = folder(context) / QUALITY
    if not path.exists():
        return None
    record = workdir.read_record(path)
    return record if record["of"] == workdir.digest(fingerprints.quality(context)) else None


def is_measured(context: Context) -> bool:
    """Whether there is nothing to measure; a generator that is read is not measured."""
    return context.config.generate.generator != "dit" or quality_of(context) is not None


def measure(context: Context) -> None:
    """Measure what images without anchors are worth: recognised, and no copies; one process' work.

    Another sampler, guidance or judge measures anew.
    """

    def missing() -> list[str]:
        return [] if is_measured(context) else [QUALITY]

    if context.work.deal(QUALITY, [QUALITY], missing):
        found, config = _measured(context), context.config
        record = {"of": workdir.digest(fingerprints.quality(context)), "judge": config.judge}
        workdir.write_record(folder(context) / QUALITY, {**record, **found._asdict()})
        distance = "unknown" if found.distance is None else f"{found.distance:.2f}"
        context.say(
            f"generator: recognised {found.recognised:.1%} (by {config.judge}), distance "
            f"{distance}, near {found.near:.1%}"
        )
        if found.faults:
            context.say(
                f"warning: the generator's images are not as they should be: "
                f"{'; '.join(found.faults)}. Train it longer (generate.fit.steps="
                f"{config.generate.fit.steps}) or make it larger (generate.denoiser)"
            )
    context.work.wait(lambda: is_measured(context))


def images_measured(classes: int) -> int:
    """How many images of these classes the quality is measured on."""
    return classes * -(-MEASURED // classes)


def _measured(context: Context) -> quality.Quality:
    classes, opened = context.config.dataset.num_classes, open_(context)
    slots = images_measured(classes) // classes
    class_N, slot_N = (x.ravel() for x in np.mgrid[:classes, :slots])
    free = dataclasses.replace(opened.sampling, strength=1.0, terms=())
    painter = Painter(context, opened._replace(sampling=free, refining=None), len(class_N))
    (painted,) = painter.paint([Wish(class_N, slot_N)], context.config.squeeze.seed)
    logits_NK = logits_of(context, context.config.judge, painted.images)
    train = context.inputs.read(context.inputs.open("train"))[:]
    test = context.inputs.test_set()[0]
    some = test[:: -(-len(test) // TESTED)]
    return quality.quality(painted.images, logits_NK.argmax(1), class_N, train=train, test=some)


# --- images -----------------------------------------------------------------------------------


class Wish(NamedTuple):
    """Images that are wanted together: their classes and slots, and where they start.

    ``anchors_NHWC`` may be None where none is needed.
    """

    classes_N: np.ndarray
    slots_N: np.ndarray
    anchors_NHWC: np.ndarray | None = None


class Painted(NamedTuple):
    """The images of a wish, uint8 at the data set's size; the latents of them, where kept."""

    images: np.ndarray
    latents_NHWC: np.ndarray | None = None


class Painter:
    """The generator on every device: a batch on each, without a collective."""

    def __init__(self, context: Context, opened: Opened, images: int, *, keeps: bool = False):
        """Place the weights.

        Args:
          images: of a wish at most; smaller ones are padded, so that a program is compiled once.
          keeps: give the latents too.
        """
        g = context.config.generate
        self._context, self._opened = context, opened
        self._batch = min(g.batch_size, images)

        networks, sampling, refining = opened.generator, opened.sampling, opened.refining

        def paint(weights: Weights, seed: Array, lane: tuple[Places, Array]) -> tuple[Array, ...]:
            found = generate.generate(networks, sampling, weights, seed, *lane, refining)
            return found if keeps else found[:1]

        self._lanes = parallel.LaneMap(
            paint, opened.weights, arity=1, devices=parallel.devices(),
            how=context.config.parallel.map,
            key=("images", networks, sampling, refining, keeps),
        )  # fmt: skip

    def paint(self, wishes: Iterable[Wish], seed: int | None = None) -> Iterator[Painted]:
        """Yield each wish's images in turn.

        Args:
          wishes: of which so many are held at a time as the devices work on.
          seed: unset, the experiment's.

        Raises:
          UserError: an image that is not finite.
          Interrupted: a stop was requested; what was yielded is whole.
        """
        g, config = self._context.config.generate, self._context.config
        seed = config.seed if seed is None else seed
        ahead, wishes = itertools.tee(wishes)
        results = self._lanes.stream(seed, (b for wish in ahead for b in self._batches(wish)))
        for wish in wishes:
            found = []
            for at in range(0, len(wish.classes_N), self._batch):
                part = slice(at, at + self._batch)
                places = list(zip(wish.classes_N[part], wish.slots_N[part], strict=True))
                images, *kept = (rows[: len(places)] for rows in next(results))
                levels = pixels.to_uint8(images, places)
                resized = pixels.resize(levels, config.dataset.image_size, g.resampler)
                found.append((resized, *kept))
                self._context.stop.check()
            yield Painted(*map(np.concatenate, zip(*found, strict=True)))

    def lower(self) -> jax.stages.Lowered:
        """The program of a batch on every device, from shapes alone."""
        index: Any = jax.ShapeDtypeStruct((self._batch,), np.int32)
        shape = (self._batch, *self._opened.latent_shape)
        anchors = jax.ShapeDtypeStruct(shape, np.float32)
        return self._lanes.lower_for((Places(index, index, index), anchors))

    def _batches(self, wish: Wish) -> Iterator[tuple[Places, np.ndarray]]:
        for at in range(0, len(wish.classes_N), self._batch):
            index = np.arange(at, at + self._batch).clip(max=len(wish.classes_N) - 1)
            classes = wish.classes_N[index].astype(np.int32)
            labels = self._opened.labels_K[classes]
            anchors_BHWC = np.zeros((self._batch, *self._opened.latent_shape), np.float32)
            if wish.anchors_NHWC is not None:
                anchors_BHWC = wish.anchors_NHWC[index]
            yield Places(classes, wish.slots_N[index].astype(np.int32), labels), anchors_BHWC
