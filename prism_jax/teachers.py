"""The teacher pool: several frozen networks behind one way of reading images."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from prism_jax.core import batching, pixels
from prism_jax.core.statistics import by_layer
from prism_jax.errors import UserError
from prism_jax.models import first_layers, layers
from prism_jax.types import Array, Normalisation, PyTree, Reading

STATISTICS = "bn_statistics"
CONV_INPUTS = "conv_inputs"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network without its weights: hashable, so that it can be static in a trace.

    Attributes:
      name: unique in its pool.
      module: a ``flax.linen`` module built with ``models.layers`` (any architecture).
      normalisation: what its weights were trained with; None: the images' own.
      class_indices: the outputs of its head that are the images' classes; None: all.
      first_bn, first_conv: paths of its first BatchNorm and convolution, one of which has its
        own multiplier; None: it has none.
    """

    name: str
    module: nn.Module
    normalisation: Normalisation | None = None
    class_indices: tuple[int, ...] | None = None
    first_bn: tuple[str, ...] | None = None
    first_conv: tuple[str, ...] | None = None

    @property
    def has_batch_norm(self) -> bool:
        return self.first_bn is not None

    def read(
        self,
        variables: PyTree,
        images_BHWC: Array,
        source: Normalisation,
        *,
        statistics: bool,
        conv_inputs: bool = False,
    ) -> Reading:
        """Run the network in evaluation mode.

        Args:
          variables: its "params" and "batch_stats".
          images_BHWC: float32, normalised by ``source``.
          source: the images' normalisation; another one of the teacher's own is applied in
            front, so that gradients pass through it.
          statistics: also return the moments of every BatchNorm's input. False costs nothing.
          conv_inputs: also return the input of every convolution. False costs nothing.

        Returns:
          Logits over the images' classes, a tree like ``variables["batch_stats"]`` and a tree
          of inputs (each empty where it is not asked for).
        """
        images_BHWC = pixels.renormalise(images_BHWC, source, self.normalisation)
        told = [STATISTICS] if statistics and self.has_batch_norm else []
        told += [CONV_INPUTS] if conv_inputs and self.first_conv else []
        if told:
            logits_BK, sown = self.module.apply(variables, images_BHWC, mutable=told)
        else:
            logits_BK, sown = self.module.apply(variables, images_BHWC), {}
        logits_BK = self._classes(logits_BK)
        statistics_of = layers.whole_statistics(sown.get(STATISTICS, {}))
        return Reading(logits_BK, statistics_of, sown.get(CONV_INPUTS, {}))

    def read_features(
        self, variables: PyTree, images_BHWC: Array, source: Normalisation
    ) -> tuple[Array, Array]:
        """The penultimate features (B, D) and the logits over the images' classes (B, K)."""
        images_BHWC = pixels.renormalise(images_BHWC, source, self.normalisation)
        logits_BK, sown = self.module.apply(variables, images_BHWC, mutable=["features"])
        return layers.at_least_float32(_embedding(self.module, sown)), self._classes(logits_BK)

    def _classes(self, logits_BK: Array) -> Array:
        """Those of the images' classes, at least in float32."""
        logits_BK = layers.at_least_float32(logits_BK)
        if self.class_indices is None:
            return logits_BK
        return logits_BK[:, jnp.asarray(self.class_indices, jnp.int32)]


@dataclasses.dataclass(frozen=True)
class TeacherPool:
    """Teachers and their weights, in the order of the config; the order is part of the bits.

    ``teachers`` is static, ``variables`` are arguments of compiled functions (as constants they
    would be compiled into each program).
    """

    teachers: tuple[Teacher, ...]
    variables: tuple[PyTree, ...]
    normalisation: Normalisation

    @classmethod
    def of(
        cls,
        members: dict[str, tuple[nn.Module, PyTree]],
        *,
        image_shape: tuple[int, int, int],
        normalisation: Normalisation,
    ) -> TeacherPool:
        """Build a pool from modules and variables.

        Args:
          members: name -> (module, variables); the first is a natural primary. Modules are any
            ``flax.linen`` modules whose BatchNorms are ``models.layers.BatchNorm``.
          image_shape: (height, width, channels) of the images it will read.
          normalisation: the images' normalisation, taken to be the teachers' own.

        Raises:
          UserError: no members, or a member whose running statistics do not match its layers.
        """
        if not members:
            raise UserError("a teacher pool needs at least one network; none was given")
        for name, (module, variables) in members.items():
            check(name, module, variables, image_shape)
        teachers = tuple(
            describe(name, module, image_shape) for name, (module, _) in members.items()
        )
        return cls(teachers, tuple(v for _, v in members.values()), normalisation)

    def __len__(self) -> int:
        return len(self.teachers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(teacher.name for teacher in self.teachers)

    def index(self, name: str) -> int:
        """Position of a teacher.

        Raises:
          UserError: no such teacher.
        """
        if name not in self.names:
            raise UserError(f"no teacher {name!r} in the pool; there are: {', '.join(self.names)}")
        return self.names.index(name)

    def select(self, names: Sequence[str]) -> TeacherPool:
        """The pool of these teachers, in this order."""
        at = [self.index(name) for name in names]
        return dataclasses.replace(
            self,
            teachers=tuple(self.teachers[i] for i in at),
            variables=tuple(self.variables[i] for i in at),
        )


def describe(
    name: str,
    module: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    normalisation: Normalisation | None = None,
    class_indices: tuple[int, ...] | None = None,
) -> Teacher:
    """A Teacher for a module, its first layers found by tracing it once, abstractly."""
    first = first_layers(module, image_shape)
    return Teacher(
        name, module, normalisation, class_indices, first[layers.BatchNorm], first[layers.Conv]
    )


def check(
    name: str, module: nn.Module, variables: PyTree, image_shape: tuple[int, int, int]
) -> None:
    """Refuse a network of which moments cannot be matched, by tracing it once, abstractly.

    Raises:
      UserError: variables that are not the module's, running statistics that no
        ``models.layers.BatchNorm`` keeps, or one such layer that several calls share.
    """
    calls: Counter[str] = Counter()

    def count(run, arguments, keywords, context):
        if isinstance(context.module, layers.BatchNorm) and context.method_name == "__call__":
            calls["/".join(context.module.path)] += 1
        return run(*arguments, **keywords)

    images_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        with nn.intercept_methods(count):
            _, sown = jax.eval_shape(
                lambda v, x: module.apply(v, x, mutable=[STATISTICS]), variables, images_BHWC
            )
    except flax.errors.FlaxError as error:
        raise UserError(f"the variables of teacher {name} are not its module's: {error}") from error
    kept = by_layer(variables.get("batch_stats", {}))
    told = by_layer(sown.get(STATISTICS, {}))
    if untold := sorted("/".join(path) for path in kept.keys() - told.keys()):
        raise UserError(
            f"teacher {name} keeps running statistics of {_some(untold)}, and tells no moments of "
            f"them when it reads images: a BatchNorm must be prism_jax.models.layers.BatchNorm, "
            f"and run in evaluation too; build the network with these and give it the same weights"
        )
    if shared := sorted(path for path, number in calls.items() if number > 1):
        raise UserError(
            f"teacher {name} calls {_some(shared)} more than once in a pass, and only the last "
            f"call's moments would be matched; give each call a BatchNorm of its own"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@contextlib.contextmanager
def batch_statistics(batch: int, group: int | None = None, parts: int = 1) -> Iterator[None]:
    """Let BatchNorms normalise with the statistics of the batch, not with the running ones.

    Nothing else changes: running statistics stay, dropout stays off.

    Args:
      batch: images in the batch.
      group: images that are normalised together; None: all of a part.
      parts: into which the batch divides first, as a student's does (``core.batching``).
    """
    passes = batching.passes(batch, accumulate=parts, bn_group=group)
    part = layers.BatchPart(tuple(g for one in passes for g in one.groups), 0, batch)

    def intercept(call, arguments, keywords, context):
        if isinstance(context.module, layers.BatchNorm) and context.method_name == "__call__":
            return call(arguments[0], train=True)
        return call(*arguments, **keywords)

    with nn.intercept_methods(intercept), layers.part_of_batch(part):
        yield


def embed(module: nn.Module, variables: PyTree, images_BHWC: Array) -> Array:
    """The penultimate features (B, D) that a module sows as ``features/embedding``."""
    _, sown = module.apply(variables, images_BHWC, mutable=["features"])
    return _embedding(module, sown)


def _embedding(module: nn.Module, sown: PyTree) -> Array:
    found = jax.tree.leaves(sown.get("features", {}))
    if len(found) != 1:
        raise UserError(
            f"{type(module).__name__} tells {len(found)} penultimate features; call "
            f"layers.sow_embedding(self, x_BD) once, on what its last layer reads"
        )
    return found[0]
