"""One training on several devices: the same up to the order in which sums are added.

Measured: 1.5e-6 where one group spans the devices, 3e-7 otherwise, 6.5e-6 for DIST. The bounds are
about seven times that; each twin is a hundred times further off.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import only_fast_programs
from helpers.networks import GREY, TwoConvs, random_variables
from helpers.running import COLLECTIVES

from prism_jax import parallel, training
from prism_jax.core.augment import Augment
from prism_jax.training import TrainBatch, Trainer, TrainRecipe

__all__ = ["only_fast_programs"]  # a fixture

pytestmark = pytest.mark.usefixtures("only_fast_programs")

SHAPE, CLASSES, SIZE, STEPS = (8, 8, 1), 5, 16, 5
HOW = Augment(crop_min=0.5, flip=True, mix="cutmix")
MODULE = TwoConvs(num_classes=CLASSES)
# What is divided how: four groups of four in four parts, in two parts, in one; one group for all.
DIVISIONS = {
    "parts": {"accumulate": 4},
    "groups of parts": {"accumulate": 2, "bn_group": 4},
    "groups": {"bn_group": 4},
    "one group": {},
}
BOUND = 1e-5  # of anything in the state, after five steps of SGD; values are of order one


def batch(number: int, size: int = SIZE) -> TrainBatch:
    """The first images of a batch of sixteen."""
    random = np.random.default_rng(number)
    images = random.integers(0, 256, (SIZE, *SHAPE), np.uint8)
    labels = random.integers(0, CLASSES, SIZE).astype(np.int32)
    logits = random.standard_normal((SIZE, CLASSES)).astype(np.float32)
    return TrainBatch(number, 0, images[:size], labels[:size], logits[:size])


def trainer_of(devices: int, **options) -> Trainer:
    fields = {"loss": "mse_gt", "ce_weight": 0.5, "optimiser": "sgd", "learning_rate": 0.05}
    recipe = TrainRecipe("relabel/view", HOW, epochs=STEPS, ema=0.8, **{**fields, **options})
    return Trainer(MODULE, recipe, GREY, view_seed=1, seed=1, devices=devices)


@functools.cache
def start():
    """The same for all, on the host."""
    variables = random_variables(MODULE, SHAPE, 0)
    return jax.device_get(trainer_of(1).start(SHAPE))._replace(ema=variables, **variables)


def begin(devices: int, **options):
    trainer = trainer_of(devices, **options)
    return trainer, trainer.place(jax.tree.map(np.copy, start()))


@functools.cache
def train(devices: int = 1, *, sizes: tuple[int, ...] = (SIZE,) * STEPS, **options):
    """The state and the losses after some steps."""
    trainer, state = begin(devices, **options)
    losses = []
    for number, size in enumerate(sizes):
        state, loss = trainer.step(state, batch(number, size))
        losses.append(loss)
    return jax.device_get((state, losses))


def apart(these, those) -> float:
    """The largest difference of any leaf, relative where values exceed one."""
    pairs = zip(jax.tree.leaves(these), jax.tree.leaves(those), strict=True)
    return max(float((np.abs(a - b) / np.maximum(1, np.abs(a))).max()) for a, b in pairs)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("division", DIVISIONS)
def test_any_number_of_devices_trains_the_same_network(division, devices):
    options = DIVISIONS[division]
    one, several = train(1, **options), train(devices, **options)
    assert apart(one, several) < BOUND
    again = train.__wrapped__(devices, **options)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, several, again)))


def test_wrong_ways_to_share_a_batch_do_not_pass():
    one = train(1, accumulate=4)
    twins = {
        "the first device's gradient only": train(accumulate=2, sizes=(SIZE // 2,) * STEPS),
        "gradients summed, not averaged": train(accumulate=4, learning_rate=0.1),
        "groups divided between devices": train(accumulate=4, bn_group=2),
        "statistics over all devices": train(),
    }
    for name, twin in twins.items():
        assert apart(one[0].variables, twin[0].variables) > 100 * BOUND, name


def test_a_loss_that_sees_a_whole_part_sees_the_same_part():
    options = {"loss": "dist", "temperature": 2.0, "accumulate": 4}
    one = train(1, **options)
    for devices in (2, 4):
        assert apart(one, train(devices, **options)) < 5 * BOUND
    assert apart(one, train(1, **{**options, "accumulate": 2, "bn_group": 4})) > 100 * BOUND


def test_a_ragged_batch_is_computed_by_every_device():
    sizes = (SIZE, SIZE, 7)
    one = train(1, accumulate=2, sizes=sizes)
    assert apart(one, train(2, accumulate=2, sizes=sizes)) < BOUND


def test_resumed_on_several_devices_it_has_the_same_bits():
    whole, _ = train(4, accumulate=4)
    halfway, _ = train(4, accumulate=4, sizes=(SIZE,) * 3)
    trainer, _ = begin(4, accumulate=4)
    state = trainer.place(halfway)
    for number in (3, 4):
        state, _ = trainer.step(state, batch(number))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, jax.device_get(state))))


def collectives(devices: int, **options) -> int:
    """How many the compiled step holds."""
    trainer, state = begin(devices, **options)
    numbered = batch(0)._replace(epoch=np.int32(0), batch=np.int32(0), view_epoch=np.int32(0))
    arguments = (*trainer._arguments, trainer.mesh.replicate(state), trainer.mesh.spread(numbered))
    text = trainer._step.lower(*arguments).compile().as_text()
    return sum(text.count(f" {name}(") for name in COLLECTIVES)


def test_statistics_of_whole_groups_cross_no_device():
    """What crosses: partners of the mix, and the sums at the end, however many layers there are."""
    assert collectives(1, accumulate=4) == 0
    within, across = collectives(4, accumulate=4), collectives(4)
    assert 0 < within < across


def test_weights_are_sent_once(monkeypatch):
    """Not with every step or batch: on a GPU some hundred arrays, or megabytes, each time."""
    trainer, state = begin(2)
    assert all(len(x.sharding.device_set) == 2 for x in jax.tree.leaves(trainer.start(SHAPE)))
    sent = []
    monkeypatch.setattr(trainer.mesh, "replicate", lambda tree: sent.append(tree) or tree)
    for number in range(2):
        state, _ = trainer.step(state, batch(number))
    assert sent == []

    def forward(module, normalisation, mesh):
        def read(variables, images):
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(variables))
            return np.zeros((len(images), CLASSES))

        return read

    monkeypatch.setattr(training, "jitted_forward", forward)
    variables = random_variables(MODULE, SHAPE, 0)
    assert isinstance(jax.tree.leaves(variables)[0], np.ndarray)
    training.test(MODULE, variables, np.zeros((3, *SHAPE), np.uint8), np.zeros(3, np.int32), GREY)


def test_testing_is_shared_too():
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (29, *SHAPE), np.uint8)
    labels = random.integers(0, CLASSES, 29).astype(np.int32)
    variables = random_variables(MODULE, SHAPE, 0)
    one = training.test(MODULE, variables, images, labels, GREY, batch_size=8)
    for devices in (2, 4):
        mesh = parallel.data_mesh(devices)
        found = training.test(MODULE, variables, images, labels, GREY, batch_size=8, mesh=mesh)
        assert found[:2] == one[:2]
        np.testing.assert_array_equal(found.per_class_K, one.per_class_K)


def test_rows_that_do_not_divide_are_everywhere():
    mesh = parallel.data_mesh(4)
    spread = mesh.spread({"rows": np.zeros((8, 3)), "ragged": np.zeros((7, 3)), "one": np.int32(1)})
    shapes = {k: {s.data.shape for s in x.addressable_shards} for k, x in spread.items()}
    assert shapes == {"rows": {(2, 3)}, "ragged": {(7, 3)}, "one": {()}}
    assert parallel.data_mesh(4) is mesh
    alone = parallel.data_mesh()
    x = jnp.zeros((8, 3))
    assert alone.spread(x) is x and alone.replicate(x) is x and alone.keep_spread(x) is x
