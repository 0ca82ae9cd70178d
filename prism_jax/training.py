"""Training and testing a network: teachers in squeeze, students in validate.

One jitted step per batch, at top level: on a CPU the gradient by the weights is slow inside a
loop. How a batch divides into parts, BatchNorm groups and devices: ``core.batching``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prism_jax import parallel, rng
from prism_jax.core import batching, given, losses, pixels, schedules
from prism_jax.core.augment import Augment, augment, show
from prism_jax.data.answers import NONE
from prism_jax.data.lazy import Images, read_ahead
from prism_jax.data.pipeline import continuous_index, num_batches, read_batches
from prism_jax.errors import UserError
from prism_jax.labelling import LabelledEpochs
from prism_jax.models import layers
from prism_jax.types import (
    AnyArray,
    Array,
    Integer,
    Mix,
    Normalisation,
    PyTree,
    SoftLabels,
    View,
)

TESTED = 256  # images per call of a test, where there are as many


def kernels(params: PyTree) -> PyTree:
    """What decays: kernels. Biases, norms, tokens and tables do not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: path[-1].key == "kernel" and p.ndim > 1, params
    )


DECAYS: dict[str, Callable[[PyTree], PyTree]] = {
    "kernels": kernels,
    "all": functools.partial(jax.tree.map, lambda p: True),
}


@dataclasses.dataclass(frozen=True)
class TrainRecipe:
    """How a network is trained; static in the trace.

    ``views`` names the random stream of views and mixes: a student of soft labels uses the
    stream the labels were made with. The learning rate is constant within an epoch; ``zeta``,
    ``milestones`` and ``gamma`` are values of the schedules that take them. ``accumulate`` and
    ``bn_group`` divide the batch, see ``core.batching``. ``ema`` is the decay of the average of
    weights and, with ``ema_statistics``, of running statistics that is tested in their place.
    """

    views: str
    augment: Augment
    loss: str = "ce"
    ce_weight: float = 0.0
    temperature: float = 1.0
    epochs: int = 10
    accumulate: int = 1
    bn_group: int | None = None
    optimiser: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    decay: str = "kernels"
    momentum: float = 0.9
    nesterov: bool = False
    schedule: str = "cosine"
    zeta: float | None = None
    milestones: tuple[float, ...] | None = None
    gamma: float | None = None
    warmup: int = 0
    warmup_start: float = 0.01
    ema: float | None = None
    ema_statistics: bool = True


def adamw(recipe: TrainRecipe) -> optax.GradientTransformation:
    """AdamW with PyTorch's defaults, without its learning rate."""
    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(recipe.weight_decay, DECAYS[recipe.decay]),
    )


def sgd(recipe: TrainRecipe) -> optax.GradientTransformation:
    """PyTorch's SGD with momentum and coupled weight decay, without its learning rate."""
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, DECAYS[recipe.decay]),
        optax.trace(recipe.momentum, nesterov=recipe.nesterov),
    )


OPTIMISERS: dict[str, Callable[[TrainRecipe], optax.GradientTransformation]] = {
    "adamw": adamw,
    "sgd": sgd,
}


class TrainState(NamedTuple):
    """A network in training.

    Attributes:
      step: optimiser steps done.
      params, batch_stats, opt_state: what training goes on from.
      ema: {"params", "batch_stats"} averaged over steps, or None.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree = None

    @property
    def variables(self) -> PyTree:
        """What is tested and kept: the average where there is one."""
        return self._raw if self.ema is None else self.ema

    @property
    def _raw(self) -> PyTree:
        return {"params": self.params, "batch_stats": self.batch_stats}


class TrainBatch(NamedTuple):
    """One batch: its coordinates, pixels, hard labels, and soft labels or None.

    ``view_epoch`` is the epoch whose views and mixes are shown: another one than ``epoch`` where
    soft labels of fewer epochs come again; None means ``epoch``. ``weights_B`` is how much each
    image counts, 1 on average over the set; None means alike. ``shown`` are view and mix of labels
    that were made elsewhere; None means that they are drawn.
    """

    epoch: Integer
    batch: Integer
    images_uint8_BHWC: AnyArray
    labels_B: AnyArray
    logits_BK: AnyArray | None = None
    view_epoch: Integer | None = None
    weights_B: AnyArray | None = None
    shown: tuple[View, Mix] | None = None


class TestResult(NamedTuple):
    """Fractions in [0, 1]: top-1, top-5, and top-1 of each class (NaN where it has no image).

    ``answers_N`` are the classes that were said, -1 where logits are not finite.
    """

    top1: float
    top5: float
    per_class_K: np.ndarray
    answers_N: np.ndarray


def initial_state(
    module: nn.Module,
    recipe: TrainRecipe,
    seed: int,
    image_shape: tuple[int, int, int],
    variables: PyTree | None = None,
) -> TrainState:
    """The state before the first step: of ``variables``, or of :func:`fresh` ones."""
    variables = variables or fresh(module, seed, image_shape)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    opt_state = _jitted_optimiser(dataclasses.replace(recipe, epochs=0))(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state)
    if recipe.ema is not None:  # a copy: the step may reuse the memory of both
        state = state._replace(ema=jax.tree.map(jnp.copy, state.variables))
    return state


@functools.lru_cache(maxsize=32)
def _jitted_optimiser(recipe: TrainRecipe) -> jax.stages.Wrapped:
    """An optimiser's first state; one program for all of its zeros, whose shapes are many."""
    return jax.jit(OPTIMISERS[recipe.optimiser](recipe).init)


def fresh(module: nn.Module, seed: int, image_shape: tuple[int, int, int]) -> PyTree:
    """Fresh weights from the stream "train/init" of ``seed``."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    return jitted_init(module)(rng.stream(rng.root(seed), "train/init"), images)


def jitted_init(module: nn.Module) -> jax.stages.Wrapped:
    """Fresh variables, compiled: ``f(key, images)``."""
    return _jitted_init(module, parallel.on_cpu())


@functools.cache
def _jitted_init(module: nn.Module, on_cpu: bool) -> jax.stages.Wrapped:
    # A module's weights are drawn few times: compile it fast, not well (a quarter of the time).
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = fast if on_cpu else None
    return jax.jit(functools.partial(module.init, train=False), compiler_options=options)


def train_step(
    recipe: TrainRecipe,
    module: nn.Module,
    normalisation: Normalisation,
    mesh: parallel.DataMesh,
    view_seed: Array,
    seed: Array,
    epochs: Array,
    state: TrainState,
    batch: TrainBatch,
) -> tuple[TrainState, Array]:
    """One optimiser step, from pixels: view, mix, forward, loss, update.

    Args:
      mesh: over whose devices the batch is spread, where it divides.
      view_seed: whose views and mixes; ``seed``: whose dropout.
      epochs: length of the schedule, in place of the recipe's; so that trainings of different
        lengths share a program.

    Returns:
      The new state, and the loss averaged over the batch.
    """
    if batch.shown is None:
        assert batch.view_epoch is not None  # Trainer.step states it
        key = rng.stream(rng.root(view_seed), recipe.views, batch.view_epoch, batch.batch)
        images_BHWC, mix = augment(key, batch.images_uint8_BHWC, recipe.augment, normalisation)
    else:
        view, mix = batch.shown
        images_BHWC = show(batch.images_uint8_BHWC, view, mix, normalisation)
    # One mask for the whole batch: each pass takes its own rows of it.
    dropout = rng.stream(rng.root(seed), "train/dropout", batch.epoch, batch.batch)
    dropout = rng.stream(dropout, "part", 0)
    size = images_BHWC.shape[0]
    targets = losses.Targets(
        batch.labels_B,
        batch.labels_B[mix.partner_B],
        mix.weight,
        None if batch.logits_BK is None else batch.logits_BK.astype(jnp.float32),
        importance(batch.weights_B, mix),
    )

    def objective(params, batch_stats, part: batching.Pass):
        with layers.part_of_batch(layers.BatchPart(part.groups, part.start, size)):
            logits_BK, updated = module.apply(
                {"params": params, "batch_stats": batch_stats},
                mesh.keep_spread(images_BHWC[part.rows]), train=True, mutable=["batch_stats"],
                rngs={"dropout": dropout},
            )  # fmt: skip
        mine = jax.tree.map(lambda x: x[part.rows] if x.ndim else x, targets)
        return student_loss(
            recipe, layers.at_least_float32(logits_BK), mine, len(part.parts)
        ), updated

    division: dict[str, Any] = {"accumulate": recipe.accumulate, "bn_group": recipe.bn_group}
    devices = mesh.count if batching.fits(size, mesh.count, **division) else 1
    loss, batch_stats = jnp.zeros((), jnp.float32), state.batch_stats
    gradient = jax.tree.map(jnp.zeros_like, state.params)
    for part in batching.passes(size, devices=devices, **division):
        share = (part.stop - part.start) / size
        (part_loss, updated), part_gradient = jax.value_and_grad(objective, has_aux=True)(
            state.params, batch_stats, part
        )
        loss += share * part_loss
        gradient = jax.tree.map(lambda g, p, s=share: g + s * p, gradient, part_gradient)
        batch_stats = updated.get("batch_stats", {})

    rate = recipe.learning_rate * learning_rate(recipe, batch.epoch, epochs)
    optimiser = OPTIMISERS[recipe.optimiser](recipe)
    direction, opt_state = optimiser.update(gradient, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    ema, kept = state.ema, recipe.ema
    if kept is not None:
        new = {"params": params, "batch_stats": batch_stats}
        ema = jax.tree.map(lambda e, x: kept * e + (1.0 - kept) * x, ema, new)
        if not recipe.ema_statistics:
            ema["batch_stats"] = batch_stats
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), loss


def importance(weights_B: AnyArray | None, mix: Mix) -> AnyArray | None:
    """How much mixed images count: what they are made of, in the shares of its pixels."""
    if weights_B is None:
        return None
    return mix.weight * weights_B + (1.0 - mix.weight) * weights_B[mix.partner_B]


def student_loss(
    recipe: TrainRecipe, logits_BK: Array, targets: losses.Targets, parts: int
) -> Array:
    """The mean of the losses of equal parts: what is not a mean over images sees one at a time."""
    loss = functools.partial(
        losses.STUDENT_LOSSES[recipe.loss],
        ce_weight=recipe.ce_weight,
        temperature=recipe.temperature,
    )
    if parts == 1:
        return loss(logits_BK, targets)
    apart = jax.tree.map(
        lambda x: x.reshape(parts, -1, *x.shape[1:]) if x.ndim else x, (logits_BK, targets)
    )
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, apart)
    return jax.vmap(loss, axes)(*apart).mean()


def learning_rate(recipe: TrainRecipe, epoch: Integer, epochs: Integer) -> Array:
    """The multiplier of the learning rate in an epoch."""
    given = {"zeta": recipe.zeta, "milestones": recipe.milestones, "gamma": recipe.gamma}
    return schedules.warmed_up(
        recipe.schedule, epoch, epochs, warmup=recipe.warmup, warmup_start=recipe.warmup_start,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip


class Trainer:
    """A jitted train step and a jitted test of one network."""

    def __init__(
        self,
        module: nn.Module,
        recipe: TrainRecipe,
        normalisation: Normalisation,
        *,
        view_seed: int,
        seed: int,
        devices: int = 1,
    ):
        """Compile nothing yet.

        Args:
          module: the network.
          recipe, normalisation: how it is trained.
          view_seed: whose views and mixes; ``seed``: whose weights and dropout.
          devices: how many share each batch; one that does not divide into whole groups for each
            (``batching.fits``) is computed by every one of them.
        """
        self.module, self.recipe, self.normalisation = module, recipe, normalisation
        self.mesh = parallel.data_mesh(devices)
        self._seed = seed
        self._arguments = np.uint32(view_seed), np.uint32(seed), np.int32(recipe.epochs)
        recipe = dataclasses.replace(recipe, epochs=0)
        self._step = _jitted_step(recipe, module, normalisation, self.mesh)

    def start(
        self, image_shape: tuple[int, int, int], variables: PyTree | None = None
    ) -> TrainState:
        """The given weights, or fresh ones for images of (height, width, channels)."""
        return self.place(
            initial_state(self.module, self.recipe, self._seed, image_shape, variables)
        )

    def place(self, state: TrainState) -> TrainState:
        """A state that does not come from here, such as a restored one, where ``step`` has it."""
        return self.mesh.replicate(state)

    def step(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, Array]:
        """One optimiser step; the loss stays on the device."""
        return self._step(*self._arguments, state, self._spread(batch))

    def lower(self, state: TrainState, batch: TrainBatch) -> jax.stages.Lowered:
        """The program of a step for arguments of such shapes, to be compiled and inspected."""
        return self._step.lower(*self._arguments, self.place(state), self._spread(batch))

    def _spread(self, batch: TrainBatch) -> TrainBatch:
        view_epoch = batch.epoch if batch.view_epoch is None else batch.view_epoch
        batch = batch._replace(
            epoch=np.int32(batch.epoch),
            batch=np.int32(batch.batch),
            view_epoch=np.int32(view_epoch),
        )
        return self.mesh.spread(batch)

    def test(
        self, state: TrainState, images_uint8: Images, labels, *, batch_size: int = TESTED
    ) -> TestResult:
        """Accuracy on real images, in evaluation mode, without augmentation."""
        return test(
            self.module, state.variables, images_uint8, labels, self.normalisation,
            batch_size=batch_size, mesh=self.mesh,
        )  # fmt: skip


@functools.cache
def _jitted_step(
    recipe: TrainRecipe, module: nn.Module, normalisation: Normalisation, mesh: parallel.DataMesh
) -> jax.stages.Wrapped:
    """One executable per (recipe, network): seeds, controls and student seeds share it."""
    return mesh.jit(functools.partial(train_step, recipe, module, normalisation, mesh), donate=(3,))


@functools.cache
def jitted_forward(
    module: nn.Module, normalisation: Normalisation, mesh: parallel.DataMesh
) -> jax.stages.Wrapped:
    """The logits of uint8 images in evaluation mode, compiled: ``f(variables, images)``."""

    def forward(variables, images_uint8_BHWC):
        logits_BK: Any = module.apply(variables, pixels.normalise(images_uint8_BHWC, normalisation))
        return layers.at_least_float32(logits_BK)

    return mesh.jit(forward)


def test(
    module: nn.Module,
    variables: PyTree,
    images_uint8_NHWC: Images,
    labels_N: np.ndarray,
    normalisation: Normalisation,
    *,
    batch_size: int = TESTED,
    class_indices: tuple[int, ...] | None = None,
    mesh: parallel.DataMesh | None = None,
) -> TestResult:
    """Test a network on images; the last batch is padded, so that one program serves all.

    Args:
      images_uint8_NHWC: an array, or images that are read batch by batch.
      class_indices: the outputs that are the classes; None: all of them.
      mesh: the devices that share a batch.
    """
    mesh = mesh or parallel.data_mesh()
    forward = jitted_forward(module, normalisation, mesh)
    variables = jax.device_put(mesh.replicate(variables))  # once, not with every batch
    count = len(labels_N)
    batch_size = mesh.count * -(-min(batch_size, count) // mesh.count)
    right1, right5 = np.zeros(count, bool), np.zeros(count, bool)
    answers_N, classes = np.zeros(count, np.int32), 0

    def read(number: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(number * batch_size, min((number + 1) * batch_size, count))
        return rows, images_uint8_NHWC[np.resize(rows, batch_size)]

    def score(rows: np.ndarray, logits: Array) -> None:
        logits_BK = np.asarray(logits)[: len(rows)]
        if class_indices is not None:
            logits_BK = logits_BK[:, list(class_indices)]
        nonlocal classes
        classes = logits_BK.shape[1]
        order = np.argsort(-logits_BK, axis=1, kind="stable")  # ties: the lower class first
        finite_B = np.isfinite(logits_BK).all(1)
        answers_N[rows] = np.where(finite_B, order[:, 0], NONE)
        hit = (order == labels_N[rows][:, None]) & finite_B[:, None]
        right1[rows], right5[rows] = hit[:, :1].any(1), hit[:, :5].any(1)

    begun: list[tuple[np.ndarray, Array]] = []  # on the devices, while the next batch is read
    numbers = range(num_batches(count, batch_size))
    for rows, pixels_BHWC in read_batches(numbers, read, threads=_ahead(images_uint8_NHWC)):
        ended, begun = begun, [(rows, forward(variables, mesh.put(pixels_BHWC)))]
        for batch in ended:
            score(*batch)
    for batch in begun:
        score(*batch)
    per_class = [
        right1[labels_N == c].mean() if (labels_N == c).any() else np.nan for c in range(classes)
    ]
    return TestResult(float(right1.mean()), float(right5.mean()), np.array(per_class), answers_N)


def _ahead(images: Images) -> int:
    """Threads that read batches ahead: none where all images are in memory."""
    return 0 if isinstance(images, np.ndarray) else 1


def soft_batches(
    images_uint8_NHWC: Images,
    labels_N: np.ndarray,
    records: Iterable[SoftLabels],
    *,
    per_epoch: int,
    start: int = 0,
    weights_N: np.ndarray | None = None,
) -> Iterable[TrainBatch]:
    """The images that each record labels, in the order of the records.

    Args:
      records: whole epochs in any order, from global batch ``start`` of the training on; an
        epoch that comes again shows the same views again.
      per_epoch: batches per epoch.
      weights_N: how much each image counts.
    """
    read = read_ahead(images_uint8_NHWC, records, lambda record: np.asarray(record.index_B))
    for number, (record, pixels_BHWC) in enumerate(read, start):
        yield TrainBatch(
            number // per_epoch, record.batch, pixels_BHWC, labels_N[np.asarray(record.index_B)],
            np.asarray(record.logits_BK), record.epoch, _of(weights_N, record.index_B),
            record.shown,
        )  # fmt: skip


def _of(weights_N: np.ndarray | None, index_B: np.ndarray) -> np.ndarray | None:
    return None if weights_N is None else weights_N[np.asarray(index_B)]


def hard_batches(
    images_uint8_NHWC: Images,
    labels_N: np.ndarray,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    name: str,
    start: int = 0,
    weights_N: np.ndarray | None = None,
) -> Iterable[TrainBatch]:
    """Batches of one size over passes that follow one another, from batch ``start`` on."""
    count = len(labels_N)
    per_epoch = num_batches(count, batch_size)

    def read(number: int) -> TrainBatch:
        number = int(number)
        index = continuous_index(number, count=count, batch_size=batch_size, seed=seed, name=name)
        return TrainBatch(
            *divmod(number, per_epoch),
            images_uint8_NHWC[index],
            labels_N[index],
            weights_B=_of(weights_N, index),
        )

    return read_batches(range(start, epochs * per_epoch), read, threads=_ahead(images_uint8_NHWC))


def _views_of(
    soft_labels: Iterable[SoftLabels] | None, stated: dict[str, Any]
) -> tuple[Augment, int]:
    """The views of ``fit``, and the seed of those of soft labels."""
    if isinstance(soft_labels, LabelledEpochs):
        known = {**dataclasses.asdict(soft_labels.augment), "label_seed": soft_labels.seed}
        for name, value in stated.items():
            if value != known[name]:
                raise UserError(
                    f"fit got {name}={value!r}, and its soft labels were made with "
                    f"{known[name]!r}: they say nothing of other views. Leave {name} out"
                )
        return soft_labels.augment, soft_labels.seed
    mix = "none" if soft_labels is None else "cutmix"
    views: dict[str, Any] = {"crop_min": 0.25, "flip": True, "mix": mix, "label_seed": 0} | stated
    label_seed = views.pop("label_seed")
    return Augment(**views), label_seed


def fit(
    module: nn.Module,
    images_uint8_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    normalisation: Normalisation,
    soft_labels: Iterable[SoftLabels] | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    seed: int = 0,
    label_seed: int | None = None,
    crop_min: float | None = None,
    flip: bool | None = None,
    mix: str | None = None,
    devices: int = 1,
    **recipe,
) -> PyTree:
    """Train a network on images in memory.

    Args:
      module: a ``flax.linen`` module called as ``module(images, train=...)``.
      images_uint8_NHWC, labels_N: the set.
      normalisation: applied to the pixels.
      soft_labels: the records of ``relabel``, which know their views; the loss is then MSE +
        0.1 CE unless stated. Records of fewer than ``epochs`` epochs come again in the same order.
      label_seed, crop_min, flip, mix: of the views. Of soft labels they are what ``relabel`` was
        given, and may be left out; of records that do not know it, by default what ``relabel`` does
        by default. Without soft labels 0.25, True and "none".
      devices: how many share each batch, see ``Trainer``.
      **recipe: further fields of ``TrainRecipe``.

    Returns:
      The network's variables, "params" and "batch_stats"; their averages with ``ema``.

    Raises:
      UserError: images that are not uint8 NHWC, labels that are not a class for each, a field that
        is none, other views than those of the soft labels, or a loss that is not finite.
    """
    images = given.images("fit", images_uint8_NHWC)
    classes = given.num_classes(module, images.shape[1:])
    labels = given.labels("fit", labels_N, len(images), classes)
    given.fields_of("fit", recipe, TrainRecipe)
    stated = {"crop_min": crop_min, "flip": flip, "mix": mix, "label_seed": label_seed}
    how, label_seed = _views_of(soft_labels, {k: v for k, v in stated.items() if v is not None})
    if soft_labels is None:
        numbers = TrainRecipe("train/view", how, epochs=epochs, **recipe)
        batches = hard_batches(
            images, labels, batch_size=batch_size, epochs=epochs, seed=seed, name="train/order"
        )
        view_seed = seed
    else:
        recipe = {"loss": "mse_gt", "ce_weight": 0.1, **recipe}
        numbers = TrainRecipe("relabel/view", how, epochs=epochs, **recipe)
        records = list(soft_labels)
        labelled = {int(number) for record in records for number in record.index_B}
        if labelled != set(range(len(images))):
            raise UserError(
                f"fit got {len(images)} images and soft labels of {len(labelled)}, up to number "
                f"{max(labelled, default=0)}; they must be those of these images"
            )
        per_epoch = 1 + max(record.batch for record in records)
        repeated = itertools.islice(itertools.cycle(records), epochs * per_epoch)
        batches = soft_batches(images, labels, repeated, per_epoch=per_epoch)
        view_seed = label_seed
    trainer = Trainer(
        module, numbers, normalisation, view_seed=view_seed, seed=seed, devices=devices
    )
    state = trainer.start(images.shape[1:])
    loss: Array | float = 0.0
    for batch in batches:
        state, loss = trainer.step(state, batch)
    if not np.isfinite(loss):  # and stays so, once it is
        raise UserError(f"fit ended with a training loss of {loss}; lower the learning rate")
    return jax.device_get(state.variables)
