"""Statistics of a batch inside a network, and their distance from those of real images.

The statistics of one network are ``{path of a layer: {name: vector}}``. A BatchNorm tells
"mean" and "var" of its input over (B, H, W); a convolution, of its input, what the rows of
``OF_CONVOLUTIONS`` say. Targets have the same shape: running statistics, those of the training
set, or those of the batch's classes (EDC).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from prism_jax import parallel
from prism_jax.core.views import resize
from prism_jax.errors import UserError
from prism_jax.models.layers import at_least_float32
from prism_jax.types import AnyArray, Array, PyTree

Path = tuple[str, ...]
Layers = dict[Path, dict[str, Array]]


def safe_norm(x: Array) -> Array:
    """The Euclidean norm of all elements, with a gradient of 0 (not NaN) at 0.

    NaN and Inf stay what they are, so that a loss made of norms still shows them. In float32
    squares below 1e-38 count as 0 and above 3e38 as Inf.
    """
    square = jnp.sum(jnp.square(x))
    zero = square == 0  # False for NaN, unlike the negation of square > 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def by_layer(tree: PyTree) -> Layers:
    """A nested dict of modules with vectors as leaves, as ``{path: {name: vector}}``."""
    layers: Layers = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        layers.setdefault(path[:-1], {})[path[-1]] = leaf
    return layers


# --- what a batch tells ---------------------------------------------------------------------


def channel_moments(x_BHWC: Array) -> dict[str, Array]:
    """Mean and biased variance of every channel over (B, H, W), in at least float32."""
    x_BHWC = at_least_float32(x_BHWC)
    mean_C = x_BHWC.mean((0, 1, 2))
    return {"mean": mean_C, "var": jnp.square(x_BHWC - mean_C).mean((0, 1, 2))}


def patch_moments(x_BHWC: Array, patch: int) -> dict[str, Array]:
    """Mean and biased variance of every patch over images, channels and the patch's pixels.

    The map is enlarged bilinearly to the next multiple of ``patch`` and cut into squares of
    that side (G-VBSM; 16 for ImageNet, 4 for CIFAR), counted row by row.
    """
    x_BHWC = at_least_float32(x_BHWC)
    batch, height, width, channels = x_BHWC.shape
    rows, columns = -(-height // patch), -(-width // patch)
    x_BHWC = resize(x_BHWC, (rows * patch, columns * patch))
    cut = x_BHWC.reshape(batch, rows, patch, columns, patch, channels)
    mean = cut.mean((0, 2, 4, 5), keepdims=True)
    var = jnp.square(cut - mean).mean((0, 2, 4, 5))
    return {"patch_mean": mean.ravel(), "patch_var": var.ravel()}


class Kind(NamedTuple):
    """A kind of statistics of a convolution's input.

    Attributes:
      names: of its vectors, which no other kind has.
      of: ``(x_BHWC, side of patches) -> {name: vector}``.
    """

    names: tuple[str, ...]
    of: Callable[[Array, int], dict[str, Array]]


# What ``recover.match`` may name: what BatchNorms keep of their inputs, and these (G-VBSM), which
# are measured in the real images (``synthesis.measuring`` measures all of them).
OF_CONVOLUTIONS: dict[str, Kind] = {
    "conv": Kind(("mean", "var"), lambda x_BHWC, patch: channel_moments(x_BHWC)),
    "patch": Kind(("patch_mean", "patch_var"), patch_moments),
}
KINDS = ("bn", *OF_CONVOLUTIONS)
NAMES = tuple(name for kind in OF_CONVOLUTIONS.values() for name in kind.names)
VARIANCES = ("var", "patch_var")  # the names that ``variance_weight`` weighs


def of_convolutions(match: Iterable[str]) -> list[str]:
    """The kinds of convolutions' statistics among those that are matched, in the table's order."""
    return [kind for kind in OF_CONVOLUTIONS if kind in set(match)]


def of_inputs(inputs: dict[Path, Array], kinds: Iterable[str], *, patch: int) -> Layers:
    """Statistics of convolutions' inputs.

    Args:
      inputs: (B, H, W, C) by the path of their convolution.
      kinds: of ``KINDS``, of which those of convolutions count.
      patch: side of patches in pixels of the map.
    """
    rows = [OF_CONVOLUTIONS[kind] for kind in of_convolutions(kinds)]
    return {
        path: {name: vector for row in rows for name, vector in row.of(x, patch).items()}
        for path, x in inputs.items()
    }


# --- distance from a target -----------------------------------------------------------------


def alignment(
    batch: Layers,
    target: Layers,
    *,
    first: Path,
    first_multiplier: float,
    variance_weight: float = 1.0,
    keep: dict[Path, Array] | None = None,
) -> Array:
    """Distance of a batch's statistics from their targets.

        sum_l w_l sum_s c_s ||s_l - target_l,s||

    over layers l and their statistics s. Norms are not squared; ``c`` is ``variance_weight``
    for variances (DWA) and 1 for means; ``w`` is ``first_multiplier`` for the first layer and 1
    for the others (DeepInversion; SRe2L; PRISM, equation of the recover loss).

    Args:
      batch, target: statistics of the same layers and names.
      first: path of the first layer.
      keep: for some layers whether they count at all (G-VBSM's drop).

    Returns:
      A scalar.

    Raises:
      UserError: batch and target differ in their layers, or ``first`` is none of them.
    """
    named = [{(path, n) for path, layer in side.items() for n in layer} for side in (batch, target)]
    if odd := sorted(named[0] ^ named[1]):
        sides = ["its targets" if one in named[0] else "the batch" for one in odd[:5]]
        lacking = ", ".join(
            f"{name} of {'/'.join(path)} in {side}"
            for (path, name), side in zip(odd, sides, strict=False)
        )
        raise UserError(
            f"the statistics of a batch and their targets differ; missing: {lacking}. Every "
            f"BatchNorm and convolution must be of models.layers and be called exactly once, and "
            f"targets must be measured of the same layers and kinds"
        )
    if first not in batch:
        raise UserError(
            f"no layer with statistics at {'/'.join(first)}; there are: "
            f"{', '.join('/'.join(path) for path in batch)}"
        )
    paths = sorted(batch)
    pairs = {(p, n): (batch[p][n], target[p][n]) for p in paths for n in NAMES if n in batch[p]}
    norms = dict(zip(pairs, distances(list(pairs.values())), strict=True))
    total = jnp.zeros((), jax.tree.leaves(batch)[0].dtype)
    for path in paths:
        weighted = [
            (variance_weight if name in VARIANCES else 1.0) * norms[path, name]
            for name in NAMES
            if name in batch[path]
        ]
        term = functools.reduce(operator.add, weighted)
        if keep and path in keep:
            term = jnp.where(keep[path], term, 0.0)
        total += (first_multiplier if path == first else 1.0) * term
    return total


def distances(pairs: list[tuple[Array, Array]]) -> tuple[Array, ...]:
    """The Euclidean distance of each pair of vectors."""
    return parallel.suited(cpu=_one_by_one, default=_together)(pairs)


def _one_by_one(pairs: list[tuple[Array, Array]]) -> tuple[Array, ...]:
    return tuple(safe_norm(this - that) for this, that in pairs)


def _together(pairs: list[tuple[Array, Array]]) -> tuple[Array, ...]:
    """All at once, one behind the other: off the CPU each operation is a launch of its own."""
    these_N, those_N = (jnp.concatenate(side) for side in zip(*pairs, strict=True))
    ends_P = np.cumsum([this.size for this, _ in pairs])
    at_N1 = jnp.arange(len(these_N))[:, None]
    mine_NP = (at_N1 < ends_P) & (at_N1 >= np.append(0, ends_P[:-1]))
    difference_NP = jnp.where(mine_NP, (these_N - those_N)[:, None], 0.0)
    return tuple(jax.vmap(safe_norm, in_axes=1)(difference_NP))


def deviation(image: Layers, running: Layers, *, epsilon: float = 1e-6) -> Array:
    """How far one image's statistics are from the running ones (PSM, equation 4 with beta 1).

        mean_l (||mu_l - running mu_l|| + ||log((var_l + eps) / (running var_l + eps))||) / sqrt C_l

    Args:
      image, running: "mean" and "var" of the same layers, of C_l channels each.

    Returns:
      A scalar.
    """
    terms = []
    for path, target in sorted(running.items()):
        told = image[path]
        log_ratio = jnp.log((told["var"] + epsilon) / (target["var"] + epsilon))
        far = safe_norm(told["mean"] - target["mean"]) + safe_norm(log_ratio)
        terms.append(far / jnp.sqrt(jnp.float32(target["mean"].size)))
    return jnp.stack(terms).mean()


def number_of_layers(target: Layers, **weights) -> Array:
    """The sum of the layers' weights."""
    return jnp.float32(len(target) - 1 + weights["first_multiplier"])


def size_of_targets(target: Layers, **weights) -> Array:
    """The alignment of a batch whose statistics are all zero."""
    return alignment(jax.tree.map(jnp.zeros_like, target), target, **weights)


# What a teacher's alignment is measured in, to be compared with another teacher's.
SCALES: dict[str, Callable[..., Array]] = {
    "layers": number_of_layers,
    "targets": size_of_targets,
}


# --- memory of earlier batches --------------------------------------------------------------


class Memory(NamedTuple):
    """A moving average of statistics, and which layers it has seen at all."""

    average: Layers
    seen: dict[Path, Array]

    @classmethod
    def blank(cls, target: Layers, *, from_zero: bool) -> Memory:
        """Nothing seen yet; ``from_zero`` takes the zeros for an average (reference)."""
        # Reference: `isinstance(0.0, int)` is never true, so the average starts at zero.
        seen = {path: jnp.full((), from_zero) for path in target}
        return cls(jax.tree.map(jnp.zeros_like, target), seen)


def smooth(
    batch: Layers, memory: Memory, *, momentum: float, keep: dict[Path, Array] | None = None
) -> tuple[Layers, Memory]:
    """Match a moving average in value, this batch in gradient (G-VBSM, "score distillation").

        e <- momentum e + (1 - momentum) s          (e <- s where the layer is seen first)
        matched = e + s - stop_gradient(s)

    Args:
      keep: layers that do not count this time (False) are not remembered either.

    Returns:
      The matched statistics and the new memory.
    """

    def blend(old: Array, new: Array, seen: Array) -> Array:
        return jnp.where(seen, momentum * old + (1.0 - momentum) * new, new)

    matched, average, seen = {}, {}, {}
    for path, now in batch.items():
        fixed = jax.tree.map(lax.stop_gradient, now)
        before, known = memory.average[path], memory.seen[path]
        after = {name: blend(before[name], fixed[name], known) for name in now}
        matched[path] = {name: after[name] + (now[name] - fixed[name]) for name in now}
        counts = keep[path] if keep and path in keep else jnp.ones((), bool)
        average[path] = {name: jnp.where(counts, after[name], before[name]) for name in now}
        seen[path] = known | counts
    return matched, Memory(average, seen)


def sample_keep(key: Array, paths: Iterable[Path], *, drop: float) -> dict[Path, Array]:
    """Draw which layers count: each is left out with probability ``drop`` (G-VBSM)."""
    paths = sorted(paths)
    keep = jax.random.uniform(key, (len(paths),), jnp.float32) >= drop
    return {path: keep[i] for i, path in enumerate(paths)}


def of_classes(per_class: PyTree, labels_B: AnyArray) -> PyTree:
    """The mean over a batch of its classes' statistics (K, ...): a target of its own (EDC)."""
    return jax.tree.map(lambda table_KC: table_KC[labels_B].mean(0), per_class)
