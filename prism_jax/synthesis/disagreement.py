"""How far teachers' pixel gradients lie apart, and how large that is beside what an image changes.

The gradient of an iteration is ``ce + alpha * sum_t b_t bn_t``: the primary's cross entropy and the
statistics of the teachers that were drawn. Over draws of b it varies; that is the "architectural
noise" of PRISM's appendix A. One training image more or less changes ``ce`` and all ``bn_t``
through the teachers' weights.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import rng
from prism_jax.core import views
from prism_jax.synthesis.objective import teacher_gradient
from prism_jax.synthesis.recipe import Recipe, Shown, UnitBatch
from prism_jax.synthesis.step import draw_teachers, view_of
from prism_jax.teachers import Teacher
from prism_jax.types import Array, Integer, Normalisation, PyTree


class Gradients(NamedTuple):
    """Of an image batch in one iteration, by its pixels, unweighted: (T, B, H, W, C) each.

    A teacher without the statistics that are matched has zeros for ``bn``.
    """

    ce_TBHWC: Array
    bn_TBHWC: Array


class Sizes(NamedTuple):
    """Norms for each alpha, (A,).

    Attributes:
      noise_A: of the architectural noise, root mean square over draws.
      change_A: of what differs between two pools' expected gradients.
      along_A: of the noise's part along that difference, which is all that a test for it meets.
    """

    noise_A: np.ndarray
    change_A: np.ndarray
    along_A: np.ndarray


def pixel_gradients(
    recipe: Recipe,
    teachers: tuple[Teacher, ...],
    normalisation: Normalisation,
    variables: tuple[PyTree, ...],
    seed: Array,
    unit: UnitBatch,
    step: Integer,
    images_BHWC: Array,
) -> Gradients:
    """Every teacher's gradients through the view of an iteration; pure.

    Terms that remember earlier iterations, or leave layers out at random, are not in it, nor are
    the view's noise and a guide.
    """
    plain = dataclasses.replace(recipe, alpha_bn=1.0, ema=0.0, drop=0.0, flatness=0.0)
    view = view_of(recipe, rng.root(seed), unit, step, images_BHWC.shape[1:3])
    viewed_BHWC, pull_back = jax.vjp(lambda x: views.apply_view(x, view), images_BHWC)
    one, none = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    found: list[list[Array]] = [[], []]
    for teacher, weights in zip(teachers, variables, strict=True):
        gradient = teacher_gradient(plain, teacher, normalisation)
        for term, (ce, bn) in enumerate(((one, none), (none, one))):
            shown = Shown(unit.labels_B, ce, bn)
            _, _, gradient_BHWC = gradient(weights, viewed_BHWC, shown, None)
            found[term] += pull_back(gradient_BHWC)
    return Gradients(jnp.stack(found[0]), jnp.stack(found[1]))


def drawn_weights(
    recipe: Recipe, teachers: tuple[Teacher, ...], seed: int, unit: UnitBatch, draws: int
) -> np.ndarray:
    """The teachers' weights b of the statistics in so many slots, float32 (draws, T)."""

    def weights(slot: Array) -> Array:
        where = unit._replace(slot=slot)
        return draw_teachers(
            recipe, teachers, rng.root(np.uint32(seed)), where, jnp.zeros((), jnp.int32)
        ).statistic_weights_T

    return np.asarray(jax.jit(jax.vmap(weights))(jnp.arange(draws, dtype=jnp.int32)))


def cosines(vectors_TD: np.ndarray) -> np.ndarray:
    """Of every two, float64 (T, T)."""
    rows_TD = np.asarray(vectors_TD, np.float64)
    norms_T = np.linalg.norm(rows_TD, axis=1)
    return rows_TD @ rows_TD.T / np.maximum(np.outer(norms_T, norms_T), np.finfo(float).tiny)


def noise_and_change(
    ours: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
    weights_RT: np.ndarray,
    alphas_A: np.ndarray,
) -> Sizes:
    """How large the architectural noise is beside what tells two pools apart.

    With C the covariance of b and G the inner products of ours' ``bn``, the noise's mean square
    is ``alpha^2 tr(C G)``, and along the direction u of the difference ``alpha^2 v^T C v``, where
    ``v_t = <bn_t, u>``.

    Args:
      ours, theirs: the primary's ce (D,), and all teachers' bn (T, D).
    """
    ce_D, bn_TD = (np.asarray(x, np.float64) for x in ours)
    other_ce_D, other_bn_TD = (np.asarray(x, np.float64) for x in theirs)
    mean_T = np.asarray(weights_RT, np.float64).mean(0)
    covariance_TT = np.atleast_2d(np.cov(weights_RT, rowvar=False, bias=True))
    noise = np.trace(covariance_TT @ (bn_TD @ bn_TD.T)) ** 0.5
    of_ce_D, of_bn_D = other_ce_D - ce_D, mean_T @ (other_bn_TD - bn_TD)
    change_A, along_A = [], []
    for alpha in alphas_A:
        change_D = of_ce_D + alpha * of_bn_D
        size = np.linalg.norm(change_D)
        along_T = bn_TD @ change_D / max(size, np.finfo(float).tiny)
        change_A.append(size)
        along_A.append(alpha * (along_T @ covariance_TT @ along_T) ** 0.5)
    return Sizes(np.asarray(alphas_A) * noise, np.array(change_A), np.array(along_A))
