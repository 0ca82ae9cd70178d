"""Training against NumPy and PyTorch, and testing with ties, padding and missing classes."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import by_hand
from helpers.compiling import as_users, only_fast_programs
from helpers.networks import GREY, Mirror, NoNorm, TwoConvs, random_variables

import prism_jax
from prism_jax import models, rng, training
from prism_jax.core.augment import Augment, augment
from prism_jax.data.lazy import LazyImages
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.teachers import TeacherPool
from prism_jax.training import OPTIMISERS, TrainBatch, Trainer, TrainRecipe, hard_batches
from prism_jax.types import Normalisation

__all__ = ["as_users", "only_fast_programs"]  # fixtures
pytestmark = pytest.mark.usefixtures("only_fast_programs")

SHAPE, CLASSES = (6, 6, 1), 5
PLAIN = Augment(crop_min=1.0, flip=False)  # the whole image, as it is


def a_set(count: int, seed: int = 0):
    random = np.random.default_rng(seed)
    return (
        random.integers(0, 256, (count, *SHAPE), np.uint8),
        random.integers(0, CLASSES, count).astype(np.int32),
    )


def normalised(pixels) -> np.ndarray:
    return (pixels.astype(np.float64) / 255 - GREY.mean[0]) / GREY.std[0]


# --- one step of a linear network, by hand --------------------------------------------------------


def linear_gradient(kernel, bias, pixels, labels):
    """Loss and gradient of cross entropy for ``x @ kernel + bias``."""
    x = normalised(pixels).reshape(len(pixels), -1)
    z = x @ kernel + bias
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    p /= len(labels)
    return loss, x.T @ p, p.sum(0)


BATCHES = [a_set(5, seed) for seed in (1, 2, 3)]
RATE, DECAY, EPOCHS = 0.1, 0.3, 4


def by_numpy(optimiser: str, *, decay_bias=False, parts=None):
    """Three steps in epochs 0, 1, 2 of 4 under a cosine; ``parts``: unweighted means of parts."""
    params = random_variables(NoNorm(CLASSES), SHAPE, 0, np.float64)["params"]["head"]
    w = {name: np.array(params[name]) for name in ("kernel", "bias")}
    m = {name: 0.0 for name in w}
    v = {name: 0.0 for name in w}
    losses = []
    for t, (pixels, labels) in enumerate(BATCHES):
        pieces = np.array_split(np.arange(5), parts or 1)
        found = [linear_gradient(w["kernel"], w["bias"], pixels[i], labels[i]) for i in pieces]
        losses.append(np.mean([f[0] for f in found]))
        g = {"kernel": np.mean([f[1] for f in found], 0), "bias": np.mean([f[2] for f in found], 0)}
        rate = RATE * 0.5 * (1 + np.cos(np.pi * t / EPOCHS))
        for name in w:
            decay = DECAY * w[name] if name == "kernel" or decay_bias else 0.0
            if optimiser == "sgd":  # coupled: decay goes through the momentum
                m[name] = 0.9 * m[name] + g[name] + decay
                w[name] = w[name] - rate * m[name]
            else:  # decoupled (AdamW)
                m[name] = 0.9 * m[name] + 0.1 * g[name]
                v[name] = 0.999 * v[name] + 0.001 * g[name] ** 2
                m_hat, v_hat = m[name] / (1 - 0.9 ** (t + 1)), v[name] / (1 - 0.999 ** (t + 1))
                w[name] = w[name] - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay)
    return np.array(losses), w


@functools.cache
def by_trainer(optimiser: str, accumulate: int):
    recipe = TrainRecipe(
        "train/view", PLAIN, loss="ce", epochs=EPOCHS, accumulate=accumulate, optimiser=optimiser,
        learning_rate=RATE, weight_decay=DECAY, schedule="cosine",
    )  # fmt: skip
    module = NoNorm(CLASSES)
    trainer = Trainer(module, recipe, GREY, view_seed=0, seed=0)
    params = jax.tree.map(jnp.asarray, random_variables(module, SHAPE, 0)["params"])
    state = trainer.start(SHAPE)._replace(params=params)
    losses = []
    for epoch, (pixels, labels) in enumerate(BATCHES):
        state, loss = trainer.step(state, TrainBatch(epoch, 0, pixels, labels))
        losses.append(float(loss))
    assert int(state.step) == 3
    return np.array(losses), jax.device_get(state.params["head"])


def difference(these, those) -> float:
    (loss_a, w_a), (loss_b, w_b) = these, those
    pairs = [(loss_a, loss_b), *((w_a[name], w_b[name]) for name in w_a)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("accumulate", [1, 2, 5, 9])
def test_steps_equal_numpy_however_the_batch_is_divided(optimiser, accumulate):
    found = by_trainer(optimiser, accumulate)
    assert difference(found, by_numpy(optimiser)) < 2e-5


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_wrong_steps_do_not_pass(optimiser):
    found = by_trainer(optimiser, 2)
    other = next(name for name in OPTIMISERS if name != optimiser)
    twins = {
        "decay on the bias": by_numpy(optimiser, decay_bias=True),
        "parts of three and two count equally": by_numpy(optimiser, parts=2),
        "the other optimiser": by_numpy(other),
    }
    for name, twin in twins.items():
        assert difference(found, twin) > 1e-3, name


def test_an_image_of_weight_two_trains_as_two():
    """One step on five images that count differently, and on those that stand so often."""
    counts = np.array([2, 0, 1, 1, 1])
    pixels, labels = BATCHES[0]
    recipe = TrainRecipe("train/view", PLAIN, loss="ce", epochs=EPOCHS, optimiser="sgd",
                         learning_rate=RATE, weight_decay=0.0, schedule="cosine")  # fmt: skip
    trainer = Trainer(NoNorm(CLASSES), recipe, GREY, view_seed=0, seed=0)

    def after(images, labels, weights_B=None):
        batch = TrainBatch(0, 0, images, labels, weights_B=weights_B)
        state, loss = trainer.step(trainer.start(SHAPE), batch)
        return np.array([float(loss)]), jax.device_get(state.params["head"])

    repeated = np.repeat(np.arange(5), counts)
    wanted = after(pixels[repeated], labels[repeated])
    assert difference(after(pixels, labels, counts.astype(np.float32)), wanted) < 1e-6
    assert difference(after(pixels, labels), wanted) > 1e-3
    (batch,) = hard_batches(pixels, labels, batch_size=5, epochs=1, seed=0, name="order",
                            weights_N=np.arange(5, dtype=np.float32))  # fmt: skip
    at = [int(w) for w in batch.weights_B]
    assert sorted(at) == list(range(5)) and (batch.images_uint8_BHWC == pixels[at]).all()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "nesterov": True}, {"decay": "all"}])
def test_adamw_and_sgd_are_pytorchs(options):
    torch = pytest.importorskip("torch", reason="compares with torch.optim")
    random = np.random.default_rng(0)
    start = {"kernel": random.standard_normal((4, 3)), "bias": random.standard_normal(3)}
    gradients = [{k: random.standard_normal(x.shape) for k, x in start.items()} for _ in range(5)]
    momentum = {"momentum": 0.9, "nesterov": False, **options}
    bias_decay = DECAY if momentum.pop("decay", "kernels") == "all" else 0.0
    make = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=RATE),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=RATE, **momentum),
    }
    assert make.keys() == OPTIMISERS.keys()
    for name, optimiser in make.items():
        theirs = {k: torch.tensor(x, requires_grad=True) for k, x in start.items()}
        stepper = optimiser(
            [
                {"params": [theirs["kernel"]], "weight_decay": DECAY},
                {"params": [theirs["bias"]], "weight_decay": bias_decay},
            ]
        )
        with jax.enable_x64(True):
            ours = {k: jnp.asarray(x) for k, x in start.items()}
            update = OPTIMISERS[name](TrainRecipe("", PLAIN, weight_decay=DECAY, **options))
            state = update.init(ours)
            for gradient in gradients:
                direction, state = update.update(gradient, state, ours)
                ours = jax.tree.map(lambda p, d: p - RATE * d, ours, direction)
                for k, tensor in theirs.items():
                    tensor.grad = torch.tensor(gradient[k])
                stepper.step()
            for k in ours:
                np.testing.assert_allclose(ours[k], theirs[k].detach().numpy(), rtol=1e-6)


def test_only_kernels_decay():
    params = random_variables(TwoConvs(), SHAPE, 0)["params"]
    chosen = jax.tree_util.tree_leaves_with_path(training.kernels(params))
    assert {path[-1].key for path, yes in chosen if yes} == {"kernel"}
    assert {path[-1].key for path, yes in chosen if not yes} == {"scale", "bias"}
    # Tokens, positions and tables have several axes and no "weight" in their name in PyTorch.
    vit = models.build("vit_small_patch16_224", CLASSES, width=0.2, depth=0.1, stem="small")
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    chosen = jax.tree_util.tree_leaves_with_path(training.kernels(shapes))
    decayed = {path[-1].key for path, yes in chosen if yes}
    assert decayed == {"kernel"}
    assert {"cls_token", "pos_embed"} <= {path[-1].key for path, yes in chosen if not yes}


def test_batch_norm_sees_one_part_at_a_time():
    pixels, labels = a_set(6)
    module = TwoConvs(num_classes=CLASSES)
    start = jax.tree.map(np.array, random_variables(module, SHAPE, 0))

    def running_mean(parts: int) -> np.ndarray:
        """By hand: PyTorch's update of the first layer, once per part."""
        mean = start["batch_stats"]["bn1"]["mean"].astype(np.float64)
        for part in np.array_split(normalised(pixels), parts):
            z, _ = by_hand.convolve(part, start["params"]["conv1"]["kernel"], 1)
            mean = 0.9 * mean + 0.1 * z.mean((0, 1, 2))
        return mean

    def trained(accumulate: int) -> np.ndarray:
        recipe = TrainRecipe("train/view", PLAIN, accumulate=accumulate)
        trainer = Trainer(module, recipe, GREY, view_seed=0, seed=0)
        state = trainer.start(SHAPE)._replace(**jax.tree.map(jnp.asarray, start))
        state, _ = trainer.step(state, TrainBatch(0, 0, pixels, labels))
        return np.asarray(state.batch_stats["bn1"]["mean"])

    for parts in (1, 2):
        np.testing.assert_allclose(trained(parts), running_mean(parts), atol=1e-5)
        assert np.abs(trained(parts) - running_mean(3 - parts)).max() > 1e-3


@pytest.mark.parametrize("per", ["batch", "image"])
def test_hard_labels_are_mixed_as_the_pixels_are(per):
    """One step of a linear network in two parts, against NumPy: each image has its own share."""
    how = Augment(crop_min=1.0, flip=False, mix="mixup", mix_per=per)
    recipe = TrainRecipe("train/view", how, accumulate=2, optimiser="sgd", weight_decay=0.0)
    pixels, labels = a_set(6)
    trainer = Trainer(NoNorm(CLASSES), recipe, GREY, view_seed=4, seed=0)
    start = trainer.start(SHAPE)
    head = jax.tree.map(lambda x: np.array(x, np.float64), start.params["head"])
    after, _ = trainer.step(start, TrainBatch(0, 0, pixels, labels))

    key = rng.stream(rng.root(4), "train/view", 0, 0)
    images, mix = jax.jit(lambda key, pixels: augment(key, pixels, how, GREY))(key, pixels)
    x, weight_B = np.asarray(images, np.float64).reshape(6, -1), np.asarray(mix.weight)
    assert weight_B.shape == ((6,) if per == "image" else ())
    one_hot = np.eye(CLASSES)[labels]

    def kernel(weight_B) -> np.ndarray:
        weight_B1 = np.broadcast_to(weight_B, 6)[:, None]
        target = weight_B1 * one_hot + (1 - weight_B1) * one_hot[np.asarray(mix.partner_B)]
        p = np.exp(z := x @ head["kernel"] + head["bias"])
        p /= np.exp(z).sum(1, keepdims=True)
        return head["kernel"] - 1e-3 * x.T @ (p - target) / 6

    found = np.asarray(after.params["head"]["kernel"])
    assert np.abs(found - kernel(weight_B)).max() < 1e-6
    twin = weight_B.mean() if per == "image" else 1.0
    assert np.abs(found - kernel(twin)).max() > 1e-5


def norm_student(recipe: TrainRecipe, devices: int = 1):
    """A trainer of a network with BatchNorm, and its start with weights of order one."""
    module = TwoConvs(num_classes=CLASSES)
    trainer = Trainer(module, recipe, GREY, view_seed=0, seed=0, devices=devices)
    variables = jax.tree.map(np.array, random_variables(module, SHAPE, 0))
    return trainer, trainer.start(SHAPE)._replace(**variables)


def apart(these, those) -> float:
    """The largest difference of any leaf."""
    pairs = zip(jax.tree.leaves(these), jax.tree.leaves(those), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def one_step(devices: int = 1, pixels_labels=None, **options):
    recipe = TrainRecipe("train/view", PLAIN, optimiser="sgd", learning_rate=0.1, **options)
    trainer, state = norm_student(recipe, devices)
    state, loss = trainer.step(state, TrainBatch(0, 0, *(pixels_labels or a_set(12))))
    return jax.device_get(state), float(loss)


def test_groups_in_one_pass_are_groups_one_after_the_other():
    """``bn_group`` decides what BatchNorm sees; ``accumulate`` only how much is held at a time."""
    after, loss = one_step(accumulate=4)
    for options in ({"bn_group": 3}, {"bn_group": 3, "accumulate": 2}):
        found, found_loss = one_step(**options)
        assert apart(after.variables, found.variables) < 2e-6
        assert abs(found_loss - loss) < 2e-6
    # Twin: BatchNorm sees the whole batch.
    assert apart(after.variables, one_step()[0].variables) > 1e-3
    # A ragged batch of eleven has groups of at most three.
    ragged, _ = one_step(bn_group=3, pixels_labels=a_set(11))
    assert apart(ragged, one_step(accumulate=4, pixels_labels=a_set(11))[0]) < 2e-6


def by_pytorch(batches, start, *, groups: int, momentum=0.1):
    """The released loop: micro-batches one after the other, MSE + 0.5 CE, gradients accumulated."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch's training loop")
    layers_in_order = [
        torch.nn.Conv2d(1, 4, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(4, momentum=momentum),
        torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3, 2, 1, bias=False),
        torch.nn.BatchNorm2d(6, momentum=momentum), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, CLASSES),
    ]  # fmt: skip
    net = torch.nn.Sequential(*layers_in_order).double()
    names = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "head": 8}
    tensors = {}
    for layer, index in names.items():
        module, ours = layers_in_order[index], start["params"][layer]
        for name, theirs in (("scale", "weight"), ("kernel", "weight"), ("bias", "bias")):
            if name in ours:
                tensors["params", layer, name] = getattr(module, theirs)
        for name in start["batch_stats"].get(layer, {}):
            tensors["batch_stats", layer, name] = getattr(module, f"running_{name}")

    def turned(x):
        """Kernels: HWIO to OIHW, (in, out) to (out, in)."""
        return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T

    with torch.no_grad():
        for path, tensor in tensors.items():
            value = np.asarray(start[path[0]][path[1]][path[2]], np.float64)
            tensor.copy_(torch.tensor(turned(value).copy()))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for pixels, labels, logits in batches:
        optimiser.zero_grad()
        for rows in np.array_split(np.arange(len(labels)), groups):
            found = net(torch.tensor(normalised(pixels[rows]).transpose(0, 3, 1, 2)))
            loss = torch.nn.functional.mse_loss(found, torch.tensor(logits[rows]).double())
            target = torch.tensor(labels[rows]).long()
            loss = loss + 0.5 * torch.nn.functional.cross_entropy(found, target)
            (loss / groups).backward()
        optimiser.step()
    found = {"params": {}, "batch_stats": {}}
    for (kind, layer, name), tensor in tensors.items():
        value = tensor.detach().numpy()
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        found[kind].setdefault(layer, {})[name] = value
    return found


def test_students_are_trained_as_the_released_loop_trains_them():
    random = np.random.default_rng(0)
    batches = [
        (*a_set(12, seed), random.standard_normal((12, CLASSES)).astype(np.float32))
        for seed in range(4)
    ]
    start = jax.tree.map(np.array, random_variables(TwoConvs(num_classes=CLASSES), SHAPE, 0))
    expected = by_pytorch(batches, start, groups=4)
    recipe = TrainRecipe(
        "relabel/view", PLAIN, loss="mse_gt", ce_weight=0.5, optimiser="sgd", learning_rate=0.05,
        weight_decay=0.0, schedule="constant",
    )  # fmt: skip

    def ours(devices=1, **division):
        trainer, state = norm_student(dataclasses.replace(recipe, **division), devices)
        for number, (pixels, labels, logits) in enumerate(batches):
            state, _ = trainer.step(state, TrainBatch(0, number, pixels, labels, logits))
        return jax.device_get(state.variables)

    for found in (ours(accumulate=4), ours(bn_group=3), ours(accumulate=4, devices=4)):
        assert apart(found, expected) < 1e-5
    # Twins: other groups; the new group's weight in the running statistics.
    assert apart(expected, by_pytorch(batches, start, groups=2)) > 1e-2
    assert apart(expected, by_pytorch(batches, start, groups=4, momentum=0.9)) > 1e-2


class Dropped(nn.Module):
    """Dropout of the pixels, and a dense layer."""

    @nn.compact
    def __call__(self, x_BHWC, train: bool = False):
        x_BD = layers.Dropout(0.5)(layers.flatten(x_BHWC), train)
        return layers.Dense(CLASSES, name="head")(x_BD)


def test_what_is_dropped_does_not_depend_on_how_the_batch_is_divided():
    def head(accumulate: int, devices: int = 1, batch: int = 0):
        recipe = TrainRecipe("train/view", PLAIN, accumulate=accumulate, optimiser="sgd")
        trainer = Trainer(Dropped(), recipe, GREY, view_seed=0, seed=0, devices=devices)
        state, _ = trainer.step(trainer.start(SHAPE), TrainBatch(0, batch, *a_set(12)))
        return state.params

    for accumulate, devices in ((3, 1), (4, 1), (2, 2), (4, 2)):
        assert apart(head(1), head(accumulate, devices)) < 1e-7
    assert apart(head(1), head(1, batch=1)) > 1e-5  # another batch drops others


@pytest.mark.usefixtures("as_users")
def test_the_average_is_of_weights_and_of_statistics_and_is_what_is_tested():
    recipe = TrainRecipe("train/view", PLAIN, learning_rate=0.05, ema=0.8)
    trainer, state = norm_student(recipe)
    plain, bare = norm_student(dataclasses.replace(recipe, ema=None))
    state = state._replace(ema=jax.tree.map(np.array, bare.variables))
    average = jax.tree.map(lambda x: np.array(x, np.float64), bare.variables)
    for t in range(4):
        state, _ = trainer.step(state, TrainBatch(0, t, *a_set(8, t)))
        bare, _ = plain.step(bare, TrainBatch(0, t, *a_set(8, t)))
        average = jax.tree.map(lambda a, x: 0.8 * a + 0.2 * np.asarray(x), average, bare.variables)
    assert apart((state.params, state.batch_stats), (bare.params, bare.batch_stats)) == 0
    assert apart(state.variables, average) < 1e-5
    # Twins: the raw ones; averaged weights with raw statistics (as EDC's code has it).
    assert apart(state.variables["params"], bare.params) > 1e-2
    assert apart(state.variables["batch_stats"], bare.batch_stats) > 1e-2

    pixels, labels = a_set(40, 9)
    tested = trainer.test(state, pixels, labels).per_class_K
    by_hand = training.test(trainer.module, state.ema, pixels, labels, GREY).per_class_K
    np.testing.assert_array_equal(tested, by_hand)
    assert not np.array_equal(tested, plain.test(bare, pixels, labels).per_class_K)


@pytest.mark.usefixtures("as_users")
def test_an_average_of_weights_alone_has_the_last_statistics():
    recipe = TrainRecipe("train/view", PLAIN, learning_rate=0.05, ema=0.8, ema_statistics=False)
    trainer, state = norm_student(recipe)
    both, other = norm_student(dataclasses.replace(recipe, ema_statistics=True))
    state, other = (s._replace(ema=jax.tree.map(np.array, s._raw)) for s in (state, other))
    for t in range(3):
        state, _ = trainer.step(state, TrainBatch(0, t, *a_set(8, t)))
        other, _ = both.step(other, TrainBatch(0, t, *a_set(8, t)))
    assert apart(state.variables["batch_stats"], state.batch_stats) == 0
    assert apart(state.variables["params"], other.variables["params"]) == 0
    assert apart(other.variables["batch_stats"], state.batch_stats) > 1e-2  # the twin


def test_an_average_begins_at_the_first_weights():
    trainer = Trainer(NoNorm(CLASSES), TrainRecipe("", PLAIN, ema=0.9), GREY, view_seed=0, seed=3)
    state = trainer.start(SHAPE)
    assert apart(state.ema["params"], state.params) == 0


def test_seeds_and_lengths_share_one_program(compilations):
    pixels, labels = a_set(4)

    def step(view_seed, seed, epochs, state=None):
        recipe = TrainRecipe("train/view", PLAIN, epochs=epochs)
        trainer = Trainer(NoNorm(CLASSES), recipe, GREY, view_seed=view_seed, seed=seed)
        start = trainer.start(SHAPE)
        compilations.clear()
        trainer.step(start, TrainBatch(epochs - 1, seed, pixels, labels))
        return len(compilations)

    step(0, 0, 3)
    assert [step(1, 0, 3), step(0, 5, 3), step(0, 0, 7)] == [0, 0, 0]


# --- testing --------------------------------------------------------------------------------------

AS_PIXELS = Normalisation(mean=(0.0,), std=(1 / 255,))  # logits of a Mirror are the pixel values


def images_with_logits(logits_NK) -> np.ndarray:
    return np.asarray(logits_NK, np.uint8)[:, None, :, None]


def score(logits_NK, labels, *, bias=0.0, **options):
    module = Mirror()
    ones = np.ones(np.shape(logits_NK)[1], np.float32)
    variables = {"params": {"scale": ones, "bias": bias * ones}}
    images = images_with_logits(logits_NK)
    return training.test(module, variables, images, np.array(labels), AS_PIXELS, **options)


LOGITS = np.array(
    [
        [9, 1, 2, 3, 4, 5],  # label 0: first
        [9, 1, 2, 3, 4, 5],  # label 1: sixth
        [9, 1, 2, 3, 4, 5],  # label 2: fifth
        [7, 7, 0, 0, 0, 0],  # label 1: a tie, which the lower class wins
        [7, 7, 0, 0, 0, 0],  # label 0: the same tie, won
        [3, 3, 3, 3, 3, 3],  # label 4: fifth of a tie of six
        [3, 3, 3, 3, 3, 3],  # label 5: sixth of it
    ]
)
TRUE = [0, 1, 2, 1, 0, 4, 5]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_accuracy_with_ties_and_any_padding(batch_size):
    result = score(LOGITS, TRUE, batch_size=batch_size)
    assert result.top1 == pytest.approx(2 / 7)
    assert result.top5 == pytest.approx(5 / 7)
    np.testing.assert_allclose(result.per_class_K, [1, 0, 0, np.nan, 0, 0])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_images_that_are_read_batch_by_batch_give_the_same(batch_size):
    images, reads = images_with_logits(LOGITS), []

    def read(positions):
        reads.append(len(positions))
        return images[positions]

    ones = np.ones(LOGITS.shape[1], np.float32)
    variables = {"params": {"scale": ones, "bias": 0 * ones}}
    lazy = LazyImages(read, images.shape)
    found = training.test(
        Mirror(), variables, lazy, np.array(TRUE), AS_PIXELS, batch_size=batch_size
    )
    expected = score(LOGITS, TRUE, batch_size=batch_size)
    assert found[:2] == expected[:2]
    np.testing.assert_array_equal(found.per_class_K, expected.per_class_K)
    assert reads == [min(batch_size, 7)] * -(-7 // min(batch_size, 7))


def test_padding_is_not_counted():
    """Three images in batches of two: the padded fourth is a copy, and would change the mean."""
    logits = [[1, 0], [1, 0], [0, 1]]
    assert score(logits, [0, 1, 1], batch_size=2).top1 == pytest.approx(2 / 3)


def test_logits_that_are_not_numbers_are_never_right():
    result = score(LOGITS, TRUE, bias=np.nan)
    assert (result.top1, result.top5) == (0, 0)


def test_a_label_that_the_head_does_not_have_is_never_right():
    result = score(LOGITS, [6, 7, 8, 9, 10, 11, 12])
    assert (result.top1, result.top5) == (0, 0)


def test_classes_of_a_larger_head():
    result = score(LOGITS[:1], [1], class_indices=(5, 0))
    assert result.top1 == 1
    assert score(LOGITS[:1], [0], class_indices=(5, 0)).top1 == 0


# --- batches --------------------------------------------------------------------------------------


def test_batches_resume_from_any_batch():
    pixels, labels = a_set(11)
    read = functools.partial(
        hard_batches, pixels, labels, batch_size=4, epochs=3, seed=2, name="test/order"
    )
    whole = list(read())
    assert [(b.epoch, b.batch) for b in whole] == [(e, b) for e in range(3) for b in range(3)]
    for start in range(len(whole) + 1):
        rest = list(read(start=start))
        assert len(rest) == len(whole) - start
        for a, b in zip(rest, whole[start:], strict=True):
            for x, y in zip(a[:4], b[:4], strict=True):
                np.testing.assert_array_equal(x, y)
    for batch in whole:  # labels belong to their images
        for image, label in zip(batch.images_uint8_BHWC, batch.labels_B, strict=True):
            assert label in labels[(pixels == image).all((1, 2, 3))]
    assert not np.array_equal(whole[0].images_uint8_BHWC, whole[3].images_uint8_BHWC)
    lazy = LazyImages(lambda at: pixels[at], pixels.shape)
    ahead = hard_batches(lazy, labels, batch_size=4, epochs=3, seed=2, name="test/order", start=2)
    for a, b in zip(ahead, whole[2:], strict=True):
        for x, y in zip(a[:4], b[:4], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.9, "accumulate": 2, "bn_group": 1, "warmup": 1, "schedule": "cos2", "zeta": 2.0},
        {"ema": 0.9, "optimiser": "sgd", "nesterov": True, "schedule": "multistep", "gamma": 0.5,
         "milestones": (0.5,)},
    ],
)  # fmt: skip
def test_training_resumes_bit_for_bit(options):
    pixels, labels = a_set(12)
    how = Augment(crop_min=0.5, flip=True, mix="cutmix")
    recipe = TrainRecipe("train/view", how, epochs=3, **options)
    trainer = Trainer(TwoConvs(num_classes=CLASSES), recipe, GREY, view_seed=1, seed=1)

    def train(state, start=0, stop=9):
        batches = hard_batches(
            pixels, labels, batch_size=4, epochs=3, seed=1, name="train/order", start=start
        )
        for _, batch in zip(range(start, stop), batches, strict=False):
            state, _ = trainer.step(state, batch)
        return jax.device_get(state)

    whole = train(trainer.start(SHAPE))
    halfway = train(trainer.start(SHAPE), stop=5)
    resumed = train(jax.tree.map(jnp.asarray, halfway), start=5)
    late = train(jax.tree.map(jnp.asarray, halfway), start=4, stop=8)  # twin: one batch again
    same = jax.tree.map(np.array_equal, whole, resumed)
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(whole.params["head"]["kernel"], late.params["head"]["kernel"])


# --- the public function --------------------------------------------------------------------------


def bright_or_dark(count: int):
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).integers(0, 60, (count, *SHAPE))
    return (noise + 150 * labels[:, None, None, None]).astype(np.uint8), labels


def test_fit_learns_what_can_be_learnt_and_repeats():
    pixels, labels = bright_or_dark(32)
    module = TwoConvs(num_classes=2)
    fit = functools.partial(
        prism_jax.fit, module, pixels, labels, normalisation=GREY, epochs=8, batch_size=8,
        learning_rate=0.02,
    )  # fmt: skip
    student = fit()
    assert training.test(module, student, pixels, labels, GREY).top1 == 1.0
    again, other = fit(), fit(seed=1)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, student, again)))
    assert not np.array_equal(
        student["params"]["head"]["kernel"], other["params"]["head"]["kernel"]
    )
    untrained = fit(epochs=0)
    assert training.test(module, untrained, pixels, labels, GREY).top1 < 1.0


UINT8 = np.zeros((4, 6, 6, 1), np.uint8)


@pytest.mark.parametrize(
    ("pixels", "labels", "said"),
    [
        (UINT8.astype(np.float32), np.arange(4), r"dtype float32 .* needs uint8 \(N, H, W, C\)"),
        (UINT8[..., 0], np.arange(4), r"shape \(4, 6, 6\); it needs uint8 \(N, H, W, C\)"),
        (
            UINT8,
            np.arange(3),
            r"shape \(3,\); it needs whole numbers, one for each of the 4 images",
        ),
        (UINT8, np.arange(4) / 2, r"labels of dtype float64"),
        (UINT8, np.arange(4) - 1, r"labels from -1 to 2; the network knows 4 classes, 0 to 3"),
        (UINT8, np.arange(4) + 1, r"labels from 1 to 4; the network knows 4 classes, 0 to 3"),
    ],
)
def test_the_functions_refuse_what_is_no_set_of_images(pixels, labels, said):
    module = NoNorm(num_classes=4)
    variables = training.fresh(module, 0, (6, 6, 1))
    pool = TeacherPool.of({"a": (module, variables)}, image_shape=(6, 6, 1), normalisation=GREY)
    with pytest.raises(UserError, match=f"fit got .*{said}"):
        prism_jax.fit(module, pixels, labels, normalisation=GREY)
    with pytest.raises(UserError, match=f"synthesise got .*{said}"):
        prism_jax.synthesise(pool, pixels, labels, iterations=1, alpha_bn=0.0)
    if pixels is not UINT8:
        with pytest.raises(UserError, match=f"relabel got .*{said}"):
            prism_jax.relabel(pool, pixels)


@pytest.mark.parametrize("top_k", [0, 4])
def test_relabel_keeps_some_of_the_logits(top_k):
    module = NoNorm(num_classes=4)
    variables = training.fresh(module, 0, (6, 6, 1))
    pool = TeacherPool.of({"a": (module, variables)}, image_shape=(6, 6, 1), normalisation=GREY)
    with pytest.raises(UserError, match=f"top_k={top_k}; it must be from 1 to 3"):
        prism_jax.relabel(pool, UINT8, top_k=top_k)


def test_fit_says_that_it_diverged():
    pixels, labels = bright_or_dark(32)
    with pytest.raises(UserError, match="a training loss of nan; lower the learning rate"):
        prism_jax.fit(
            TwoConvs(num_classes=2), pixels, labels, normalisation=GREY, epochs=3, batch_size=8,
            optimiser="sgd", learning_rate=1e30,
        )  # fmt: skip


def test_in_bfloat16_only_the_computation_is_narrow():
    """What is kept is float32; loss and weights are near float32's, and not the same."""

    def step(dtype):
        module = models.build("convnet_d1_bn", CLASSES, width=0.125, dtype=jnp.dtype(dtype))
        recipe = TrainRecipe("train/view", PLAIN, optimiser="sgd", learning_rate=0.1)
        trainer = Trainer(module, recipe, GREY, view_seed=0, seed=0)
        state, loss = trainer.step(trainer.start(SHAPE), TrainBatch(0, 0, *a_set(12)))
        return state, float(loss)

    (wide, loss), (narrow, narrow_loss) = step("float32"), step("bfloat16")
    assert {x.dtype for x in jax.tree.leaves(narrow.variables)} == {jnp.dtype("float32")}
    assert 0 < abs(narrow_loss - loss) < 0.02 * loss
    assert 0 < apart(wide.variables, narrow.variables) < 0.02
