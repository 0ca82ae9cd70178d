"""Every method's objective, iteration by iteration, against PyTorch; and what methods share.

What PyTorch says is kept in golden_methods.json (``python tests/synthesis/test_methods.py`` writes
it anew, where PyTorch is installed), so that it is compared everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from helpers import by_torch
from helpers.compiling import only_fast_programs
from helpers.networks import COLOUR, small_pool
from helpers.running import make_unit

from prism_jax import rng, synthesis
from prism_jax.core import statistics
from prism_jax.synthesis import course

__all__ = ["only_fast_programs"]  # fixtures
pytestmark = pytest.mark.usefixtures("only_fast_programs")

GOLDEN = pathlib.Path(__file__).with_name("golden_methods.json")
SHAPE, CLASSES, PER_CLASS = (8, 8, 3), 5, 2
LABELS = np.repeat(np.array([4, 0, 2], np.int32), PER_CLASS)
SEED, BUDGET, PATCH = 5, 12, 5
BOTH = {"match": ("bn", "conv", "patch")}


@functools.cache
def pool():
    """Two teachers with targets for every statistic, of order one."""
    with jax.enable_x64(True):
        found = small_pool(2, image_shape=SHAPE, normalisation=COLOUR, dtype=np.float64)
    random = np.random.default_rng(3)

    def vector(name, *shape):
        x = random.standard_normal(shape)
        return np.exp(0.5 * x) if "var" in name else x

    variables = []
    for v in found.variables:
        patches = (-(-SHAPE[0] // PATCH)) ** 2
        sizes = {
            layer: {"mean": c, "var": c, "patch_mean": patches, "patch_var": patches}
            for layer, c in (("conv1", 3), ("conv2", v["params"]["conv2"]["kernel"].shape[2]))
        }
        norms = {
            n: {"mean": len(s["mean"]), "var": len(s["var"])} for n, s in v["batch_stats"].items()
        }
        fill = functools.partial(
            jax.tree_util.tree_map_with_path, is_leaf=lambda x: isinstance(x, int)
        )
        conv = fill(lambda path, n: vector(path[-1].key, n), sizes)
        per_class = {
            "bn": fill(lambda path, n: vector(path[-1].key, CLASSES, n), norms),
            "conv": fill(lambda path, n: vector(path[-1].key, CLASSES, n), sizes),
        }
        variables.append({**v, "conv_statistics": conv, "class_statistics": per_class})
    return dataclasses.replace(found, variables=tuple(variables))


# The recipe's fields, what they mean in PyTorch, and what a wrong implementation would compute.
CASES = {
    "dwa": (
        {"method": "dwa", "variance_weight": 2.0},
        {"variance_weight": 2.0},
        [{"variance_weight": 1.0}, {"squared": True}, {"unbiased": True}],
    ),
    "sre2l with priors": (
        {"method": "sre2l", "total_variation": 0.02, "image_l2": 0.05},
        {"total_variation": 0.02, "image_l2": 0.05},
        [{"total_variation": 0.0}, {"image_l2": 0.0}],
    ),
    "cvdd": (
        {"method": "cvdd", "committee": "listed", "priors": (56.4, 52.5)},
        {},
        [{"first": "bn2"}, {"alpha": 0.5}],
    ),
    "gvbsm": (
        {"method": "gvbsm", **BOTH, "ema": 0.4, "first_layer": "conv", "densification": 0.5,
         "slots": PER_CLASS},
        {**BOTH, "ema": 0.4, "first": "conv1", "densification": 0.5, "per_class": PER_CLASS},
        [{"first": "bn1"}, {"ema": 0.8}, {"from_zero": True}, {"densification": 0.0},
         {"patch": 4}, {"match": ("bn", "conv")}, {"match": ("conv", "patch")}],
    ),
    "gvbsm as released": (
        {"method": "gvbsm", **BOTH, "ema": 0.4, "ema_from_zero": True, "drop": 0.4},
        {**BOTH, "ema": 0.4, "from_zero": True},
        [{"from_zero": False}, {"first": "conv1"}],
    ),
    "edc": (
        {"method": "edc", **BOTH, "ema": 0.8, "class_share": 0.3, "flatness": 0.7},
        {**BOTH, "ema": 0.8, "class_share": 0.3, "flatness": 0.7},
        [{"class_share": 0.0}, {"class_share": 0.7}, {"flatness": 0.0}, {"swap_class_patch": True}],
    ),
    "edc as released": (
        {"method": "edc", **BOTH, "class_share": 0.5, "class_patch_swapped": True},
        {**BOTH, "class_share": 0.5, "swap_class_patch": True},
        [{"swap_class_patch": False}],
    ),
    "all at once, at one scale": (
        {"method": "prism", "logits_by": "uniform", "statistics_by": "uniform",
         "alignment_scale": "targets", "primary": 1},
        {"at_scale_of": 1},
        [{"at_scale_of": None}, {"at_scale_of": 0}],
    ),
}  # fmt: skip


def run_engine(recipe):
    """Per iteration: images before it, view, draw, dropped layers per teacher, terms, gradient."""
    teachers, found = pool().teachers, []
    with jax.enable_x64(True):
        step = jax.jit(
            functools.partial(synthesis.synthesis_step, recipe, teachers, pool().normalisation)
        )
        unit = make_unit(3, 1, BUDGET, LABELS)
        images = np.random.default_rng(0).standard_normal((len(LABELS), *SHAPE)) * 0.5
        state = jax.device_get(synthesis.initial_state(pool(), recipe, images))
        for _ in range(5):
            key = rng.root(SEED)
            view = synthesis.view_of(recipe, key, unit, state.step, SHAPE[:2])
            draw = synthesis.draw_teachers(recipe, teachers, key, unit, state.step)
            dropped = [[] for _ in teachers]
            for t in range(len(teachers)) if recipe.drop else ():
                drop_key = rng.stream(key, "recover/drop", 3, 1, state.step, t)
                keep = statistics.sample_keep(drop_key, [("conv1",), ("conv2",)], drop=recipe.drop)
                dropped[t] = [path[0] for path, kept in keep.items() if not kept]
            after, terms = jax.device_get(step(pool().variables, np.uint32(SEED), unit, state))
            b1 = recipe.betas[0]
            gradient = (after.opt_state.mu - b1 * state.opt_state.mu) / (1 - b1)
            found.append(
                (state.images_BHWC, jax.device_get((view, draw)), dropped, terms, gradient)
            )
            state = after
    return found


def torch_says(torch, history, terms):
    """Loss and gradient of every iteration, for the same images, views and draws."""
    teachers = [by_torch.Teacher(v, terms) for v in pool().variables]
    sizes = [teacher.size(torch) for teacher in teachers]
    average, said = None, []
    for images, (view, draw), dropped, *_ in history:
        average = images if average is None else average
        x, pull_back = by_torch.shown(torch, images, view)
        smooth = by_torch.shown(torch, average, view)[0].detach()
        loss = by_torch.priors(torch, x, terms)
        for t, teacher in enumerate(teachers):
            weights = {"logit_weight": float(draw.logit_weights_T[t]),
                       "statistic_weight": float(draw.statistic_weights_T[t])}  # fmt: skip
            if terms.at_scale_of is not None:
                weights["statistic_weight"] *= sizes[terms.at_scale_of] / sizes[t]
            if max(weights.values()) > 0:
                energy, _ = teacher.energy(
                    torch, x, LABELS, average=smooth, dropped=dropped[t], **weights
                )
                loss = loss + energy
        loss.backward()
        said.append((loss.item(), pull_back()))
        average = 0.99 * average + (1 - 0.99) * images
    return said


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")


def test_the_weights_of_dwa_against_torch(torch):
    recipe = synthesis.Recipe(method="dwa", perturb_rho=0.6, perturb_steps=3, roll=3)
    with jax.enable_x64(True):
        start = np.random.default_rng(0).standard_normal((len(LABELS), *SHAPE))
        unit = make_unit(3, 1, BUDGET, LABELS)
        found = jax.device_get(course.prepare(pool(), recipe, [(unit, start)], SEED))
        view = synthesis.view_of(recipe, rng.root(SEED), unit, np.int32(0), SHAPE[:2])
    x, _ = by_torch.shown(torch, start, jax.device_get(view))
    variables = pool().variables[0]
    weights = jax.tree.map(lambda w: torch.tensor(w, requires_grad=True), variables["params"])
    for _ in range(3):
        logits, _ = by_torch.read(torch, {**variables, "params": weights}, x)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS).long())
        leaves, tree = jax.tree.flatten(weights)
        gradient = torch.autograd.grad(loss, leaves)
        norm = torch.sqrt(sum((g**2).sum() for g in gradient))
        moved = [w + 0.2 * g / (norm + 1e-12) for w, g in zip(leaves, gradient, strict=True)]
        weights = jax.tree.unflatten(tree, [w.detach().requires_grad_() for w in moved])
    for ours, theirs, before in zip(
        *map(jax.tree.leaves, (found.weights, weights, variables["params"])), strict=True
    ):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-9, atol=1e-12)
        assert np.abs(ours - before).max() > 1e-3  # every tensor moves, also those of BatchNorm
    assert found.probes_BHWC is None


def numbers(said):
    """Every iteration's loss, and its gradient along eight directions: (5, 9)."""
    found = []
    for loss, gradient in said:
        directions = np.random.default_rng(1).standard_normal((8, gradient.size))
        found.append([float(loss), *(directions @ np.ravel(gradient)).tolist()])
    return np.array(found)


def disagreement(ours, theirs):
    """The largest relative difference over the iterations, of the loss and of the gradient."""
    loss, gradient = np.abs(ours - theirs)[:, 0], np.abs(ours - theirs)[:, 1:].max(1)
    scale = np.abs(theirs)
    return max((loss / scale[:, 0]).max(), (gradient / scale[:, 1:].max(1)).max())


def history_of(name):
    fields, _, _ = CASES[name]
    return run_engine(
        synthesis.Recipe(alpha_bn=0.25, roll=3, crop_min=0.3, statistic_patch=PATCH, **fields)
    )


def golden_of(torch, name):
    """What PyTorch says, right and with every wrong implementation."""
    _, meaning, twins = CASES[name]
    history = history_of(name)

    def says(**changed):
        terms = by_torch.Terms(**{**meaning, **changed})
        return numbers(torch_says(torch, history, terms)).tolist()

    return {"right": says(), "wrong": [says(**twin) for twin in twins]}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_pixel_gradient_of_every_method(name):
    golden, history = json.loads(GOLDEN.read_text())[name], history_of(name)
    ours = numbers([(terms.loss, gradient) for *_, terms, gradient in history])
    assert disagreement(ours, np.array(golden["right"])) < 1e-9
    if CASES[name][0].get("drop"):
        assert any(names for *_, dropped, _, _ in history for names in dropped)
    assert len(golden["wrong"]) == len(CASES[name][2])
    for twin, wrong in zip(CASES[name][2], golden["wrong"], strict=True):
        assert disagreement(ours, np.array(wrong)) > 1e-4, twin


# What is remembered, measured or scaled for the alignment, in the methods that do.
ALIGNED = ("gvbsm", "edc", "all at once, at one scale")


@pytest.mark.parametrize("name", ALIGNED)
def test_without_alignment_nothing_of_the_real_images_is_asked_for(name):
    """Squeeze measures no statistics then: the memory of them has nothing to be like."""
    recipe = synthesis.Recipe(**{**CASES[name][0], "alpha_bn": 0.0, "flatness": 0.0})
    bare = tuple({k: v[k] for k in ("params", "batch_stats")} for v in pool().variables)
    unmeasured = dataclasses.replace(pool(), variables=bare)
    idle = {
        "ema": 0.0,
        "match": ("bn",),
        "alignment_scale": "none",
        "class_share": 0.0,
        "drop": 0.0,
    }
    states = []
    with jax.enable_x64(True):
        unit = make_unit(3, 1, BUDGET, LABELS)
        images = np.random.default_rng(0).standard_normal((len(LABELS), *SHAPE)) * 0.5
        for asked in (recipe, dataclasses.replace(recipe, **idle)):
            state = synthesis.initial_state(unmeasured, asked, images)
            step = functools.partial(
                synthesis.synthesis_step, asked, unmeasured.teachers, unmeasured.normalisation
            )
            after, terms = jax.jit(step)(bare, np.uint32(SEED), unit, state)
            assert np.isfinite(terms.loss)
            states.append(np.asarray(after.images_BHWC))
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize("name", CASES)
def test_the_golden_numbers_are_torch_s(torch, name):
    golden, live = json.loads(GOLDEN.read_text())[name], golden_of(torch, name)
    for kept, said in zip(
        [golden["right"], *golden["wrong"]], [live["right"], *live["wrong"]], strict=True
    ):
        assert disagreement(np.array(said), np.array(kept)) < 1e-9


if __name__ == "__main__":
    import torch as installed

    GOLDEN.write_text(json.dumps({name: golden_of(installed, name) for name in CASES}, indent=1))
