"""A teacher reads images in another normalisation, and of another head its images' classes."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers.compiling import only_fast_programs
from helpers.networks import COLOUR, TwoConvs, random_variables

from configs import tiny
from prism_jax import models
from prism_jax.config import resolve
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.stages.context import Context
from prism_jax.teachers import STATISTICS, TeacherPool, describe
from prism_jax.types import Normalisation

__all__ = ["only_fast_programs"]  # a fixture
pytestmark = pytest.mark.usefixtures("only_fast_programs")

OWN = Normalisation(mean=(0.1, 0.6, 0.3), std=(0.4, 0.15, 0.35))
COLUMNS = (7, 0, 4, 2, 5)
SHAPE = (8, 8, 3)


@pytest.fixture
def asked():
    """A module, its variables, images, and a weight for every logit: all of order one."""
    with jax.enable_x64(True):
        module = models.build("convnet_d2_bn", 9, width=0.0625, dtype=np.float64)
        variables = random_variables(module, SHAPE, 3, np.float64)
        random = np.random.default_rng(0)
        yield module, variables, random.standard_normal((4, *SHAPE)), random.standard_normal((4, 5))


def seen(images, own=OWN, columns=COLUMNS):
    """What a teacher of these should see of images, and which logits it should give."""
    images = images * np.array(COLOUR.std) + np.array(COLOUR.mean)
    return (images - np.array(own.mean)) / np.array(own.std), list(columns)


WRONG = {
    "no normalisation of its own": {"own": COLOUR},
    "mean of the one, deviation of the other": {"own": Normalisation(OWN.mean, COLOUR.std)},
    "the first columns": {"columns": (0, 1, 2, 3, 4)},
    "the same in order": {"columns": sorted(COLUMNS)},
}


def test_logits_moments_features_and_gradient_are_those_of_its_own_normalisation(asked):
    module, variables, images, weights = asked
    teacher = describe("a", module, SHAPE, normalisation=OWN, class_indices=COLUMNS)

    def ours(images):
        reading = teacher.read(variables, images, COLOUR, statistics=True)
        return (reading.logits_BK * weights).sum(), reading

    (_, reading), gradient = jax.value_and_grad(ours, has_aux=True)(images)
    embedding, logits = teacher.read_features(variables, images, COLOUR)
    np.testing.assert_array_equal(logits, reading.logits_BK)

    def by_hand(images, **wrong):
        x, columns = seen(images, **wrong)
        logits, sown = module.apply(variables, x, mutable=[STATISTICS, "features"])
        return (logits[:, columns] * weights).sum(), (logits[:, columns], sown)

    def difference(**wrong):
        (_, (logits, sown)), by_pixel = jax.value_and_grad(
            lambda x: by_hand(x, **wrong), has_aux=True
        )(images)
        pairs = [(reading.logits_BK, logits), (gradient, by_pixel)]
        pairs += zip(
            jax.tree.leaves((reading.statistics, embedding)),
            jax.tree.leaves((sown[STATISTICS], sown["features"])), strict=True,
        )  # fmt: skip
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)

    assert difference() < 1e-12
    for what, wrong in WRONG.items():
        assert difference(**wrong) > 1e-2, what


def test_a_run_gives_teachers_what_their_weights_were_made_for(tmp_path, monkeypatch):
    c = tiny.get_config()
    c.networks.second.mean, c.networks.second.std = (0.3,), (0.6,)
    context = Context(resolve(c), tmp_path)
    monkeypatch.setattr(type(context.networks), "load", lambda self, name: {})
    first, second = context.networks.pool(("first", "second")).teachers
    assert first.normalisation is None and second.normalisation == Normalisation((0.3,), (0.6,))
    indices = dataclasses.replace(second, class_indices=COLUMNS)
    assert indices != second  # both are static in a trace: another program


class Net(nn.Module):
    """Three convolutions, each with a BatchNorm: ours, Flax's, or one of ours for all."""

    norms: tuple[str, ...]

    @nn.compact
    def __call__(self, x, train: bool = False):
        shared = layers.BatchNorm(name="shared")
        for at, kind in enumerate(self.norms):
            x = layers.Conv(4, 3, padding=1, name=f"conv{at}")(x)
            if kind == "flax":
                x = nn.BatchNorm(use_running_average=not train, name=f"flax{at}")(x)
            elif kind == "shared":
                x = shared(x, train)
            elif kind == "ours" or train or self.is_initializing():
                x = layers.BatchNorm(name=f"bn{at}")(x, train)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        (("flax", "flax"), "running statistics of flax0, flax1, and tells no moments"),
        (("ours", "flax", "ours"), "running statistics of flax1, and tells no moments"),
        (("ours", "in training"), "running statistics of bn1, and tells no moments"),
        (("ours", "shared", "shared"), "calls shared more than once in a pass"),
    ],
)
def test_a_member_whose_moments_cannot_be_matched_is_refused(norms, said):
    module = Net(norms)
    members = {"mine": (module, random_variables(module, SHAPE, 0))}
    with pytest.raises(UserError, match=f"teacher mine .*{said}.* BatchNorm"):
        TeacherPool.of(members, image_shape=SHAPE, normalisation=COLOUR)


@pytest.mark.parametrize("norms", [("ours", "ours"), ("ours", "shared"), ()])
def test_other_members_are_taken_with_their_own_variables(norms):
    module = Net(norms)
    variables = random_variables(module, SHAPE, 0)
    pool = TeacherPool.of({"mine": (module, variables)}, image_shape=SHAPE, normalisation=COLOUR)
    assert pool.teachers[0].has_batch_norm == ("ours" in norms)
    del variables["params"]["head"]
    with pytest.raises(UserError, match="the variables of teacher mine are not its module's"):
        TeacherPool.of({"mine": (module, variables)}, image_shape=SHAPE, normalisation=COLOUR)


def test_a_network_without_features_is_named_with_what_it_lacks():
    module = TwoConvs()
    variables = random_variables(module, SHAPE, 0)
    with pytest.raises(UserError, match="TwoConvs tells 0 penultimate.*layers.sow_embedding"):
        describe("a", module, SHAPE).read_features(variables, np.zeros((2, *SHAPE)), COLOUR)
