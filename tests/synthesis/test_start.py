"""Where images start: which real images and patches are taken, always the same ones."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.networks import COLOUR, TwoConvs, random_variables
from PIL import Image

from prism_jax import rng
from prism_jax.core import pixels
from prism_jax.data.sources import ArraySource
from prism_jax.errors import UserError
from prism_jax.synthesis import start as initialise
from prism_jax.synthesis.selection import Features, difficulty_groups
from prism_jax.synthesis.start import INITIALISERS, Box, Patches, Start, random_positions
from prism_jax.teachers import describe

SIZE, CLASSES, PER_CLASS, IPC = 8, 3, 24, 4


class Photographs(ArraySource):
    """Images of one class between images of the others, stored wider than high."""

    def __init__(self):
        images = np.random.default_rng(0).integers(
            0, 256, (CLASSES * PER_CLASS, 12, 20, 3), np.uint8
        )
        labels = np.tile(np.arange(CLASSES), PER_CLASS)
        super().__init__(images, labels, num_classes=CLASSES, image_size=SIZE)


SOURCE = Photographs()


def brightness(images_uint8_BHWC, cls):
    """A scorer that likes bright images; another class, another channel."""
    return images_uint8_BHWC[..., cls].mean((1, 2))


def features(cls) -> Features:
    """Of the images of a class: their pixels, and how bright they are."""
    images = np.stack([SOURCE.image(i) for i in np.flatnonzero(SOURCE.labels_N == cls)])
    pixels_ND = images.reshape(len(images), -1).astype(np.float32)
    return Features(pixels_ND, brightness(images, cls), pixels_ND.var(1))


def groups(cls, count=IPC) -> list[np.ndarray]:
    """Bright images are easy."""
    return difficulty_groups(-features(cls).log_probability_N[None], count)


def start(**fields) -> Start:
    given = {"ipc": IPC, "scorer": brightness, "features": features, **fields}
    fields = {"groups": lambda cls: groups(cls, given["ipc"]), **given}
    return Start(SOURCE, COLOUR, (SIZE, SIZE, 3), 7, **fields)


def uint8(images_BHWC) -> np.ndarray:
    return np.asarray(pixels.to_uint8(images_BHWC, COLOUR))


ALL = np.repeat(np.arange(CLASSES, dtype=np.int32), IPC), np.tile(np.arange(IPC, dtype=np.int32), 3)


@pytest.mark.parametrize("name", sorted(INITIALISERS))
def test_an_image_does_not_depend_on_what_else_is_asked_for(name):
    whole = INITIALISERS[name](start(), *ALL)
    assert whole.shape == (12, SIZE, SIZE, 3) and whole.dtype == np.float32
    turned = tuple(x[::-1] for x in ALL)
    np.testing.assert_array_equal(INITIALISERS[name](start(), *turned), whole[::-1])
    shared = start()
    for i in (5, 0, 11):
        one = INITIALISERS[name](shared, ALL[0][i : i + 1], ALL[1][i : i + 1])
        np.testing.assert_array_equal(one[0], whole[i])
    if name in initialise.SCORING:
        # Twin: a scorer of other taste finds other images.
        other = start(scorer=lambda images, cls: -brightness(images, cls))
        assert not np.array_equal(INITIALISERS[name](other, *ALL), whole)


def test_squashed_shows_the_whole_image_and_cropped_its_middle():
    cls, slot = np.array([1], np.int32), np.array([2], np.int32)
    at = np.flatnonzero(SOURCE.labels_N == 1)[2]
    original = Image.fromarray(SOURCE.original(at))
    squashed = np.array(original.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(
        uint8(INITIALISERS["real_squashed"](start(), cls, slot))[0], squashed
    )
    np.testing.assert_array_equal(
        uint8(INITIALISERS["real"](start(), cls, slot))[0], SOURCE.image(at)
    )
    assert not np.array_equal(squashed, SOURCE.image(at))


def test_selected_images_are_those_of_their_class_by_rank():
    found = uint8(INITIALISERS["real_confident"](start(), *ALL))
    for cls in range(CLASSES):
        images = [SOURCE.image(i) for i in np.flatnonzero(SOURCE.labels_N == cls)]
        ranked = sorted(images, key=lambda image, c=cls: -image[..., c].mean())
        np.testing.assert_array_equal(found[ALL[0] == cls], ranked[:IPC])
        for name, end in (("real_group_easiest", 0), ("real_group_hardest", 5)):
            of_groups = uint8(INITIALISERS[name](start(), *ALL))
            np.testing.assert_array_equal(of_groups[ALL[0] == cls], ranked[end::6])  # 4 of 6
    # Twin: the features of another class choose other images.
    other = start(features=lambda cls: features((cls + 1) % CLASSES))
    assert not np.array_equal(uint8(INITIALISERS["real_confident"](other, *ALL)), found)


def test_median_images_come_from_the_middle_outwards():
    found = uint8(INITIALISERS["real_median"](start(), *ALL))
    for cls in range(CLASSES):
        images = [SOURCE.image(i) for i in np.flatnonzero(SOURCE.labels_N == cls)]
        ranked = sorted(images, key=lambda image, c=cls: image[..., c].mean())
        expected = [ranked[i] for i in (12, 13, 11, 14)]
        np.testing.assert_array_equal(found[ALL[0] == cls], expected)
        assert not np.array_equal(found[ALL[0] == cls], ranked[:IPC])  # twins: the hardest,
        assert not np.array_equal(found[ALL[0] == cls], ranked[:-IPC:-1])  # and the easiest


def reference_order(count, wanted):
    """DELT's walk, with its sign that changes each time."""
    middle, sign, ranks = -(-count // 2), -1, []
    for i in range(wanted):
        ranks.append(middle + int(sign * (i + 1) / 2))
        sign = -sign
    return ranks


def test_middle_out_walks_as_the_reference_and_never_leaves():
    for count, wanted in ((10, 7), (11, 6), (1300, 50)):
        assert initialise.middle_out(count, wanted) == reference_order(count, wanted)
    for count in (1, 2, 5):
        assert sorted(initialise.middle_out(count, 99)) == list(range(count))


# --- mosaics ----------------------------------------------------------------------------------


def quarters(image):
    half = SIZE // 2
    return [image[:half, :half], image[:half, half:], image[half:, :half], image[half:, half:]]


def reference_patches(cls, *, images=300, crops=5):
    """RDED's selection image by image: the crops drawn again from the same stream."""
    draw = rng.generator(7, "recover/patches", cls)
    members = draw.permutation(np.flatnonzero(SOURCE.labels_N == cls))[:images]
    kept = []
    boxes = [
        [initialise.random_box(draw, *SOURCE.original(i).shape[:2]) for _ in range(crops)]
        for i in members
    ]
    for i, of_image in zip(members, boxes, strict=True):
        cuts = []
        for top, left, height, width in of_image:
            picture = Image.fromarray(SOURCE.original(i))
            box = (left, top, left + width, top + height)
            cuts.append(np.array(picture.resize((SIZE // 2,) * 2, Image.Resampling.BILINEAR, box)))
        kept.append(max(cuts, key=lambda c: c[..., cls].mean()))
    return sorted(kept, key=lambda c: -c[..., cls].mean())


def test_mosaics_hold_the_patches_by_rank():
    fields = {"ipc": 3, "patches": Patches(images=20)}
    classes, slots = (
        np.repeat(np.arange(3, dtype=np.int32), 3),
        np.tile(np.arange(3, dtype=np.int32), 3),
    )
    found = uint8(INITIALISERS["mosaic"](start(**fields), classes, slots))
    for cls in range(CLASSES):
        ranked = reference_patches(cls, images=20)
        for slot in range(3):
            mine = quarters(found[3 * cls + slot])
            np.testing.assert_array_equal(mine, [ranked[k * 3 + slot] for k in range(4)])
            # Twin: all of the best patches in the first image.
            assert not np.array_equal(mine, [ranked[slot * 4 + k] for k in range(4)])


def test_a_patch_that_fills_the_image_and_patches_around_the_median():
    fields = {"patches": Patches(factor=1, choice="median", crops=2)}
    found = uint8(INITIALISERS["mosaic"](start(**fields), *ALL))
    best = uint8(INITIALISERS["mosaic"](start(patches=Patches(factor=1, crops=2)), *ALL))
    scores, high = (brightness(x[ALL[0] == 1], 1) for x in (found, best))
    assert (np.diff(high) <= 1e-9).all() and high.min() > scores.max()
    assert scores[1] <= scores[0] <= scores[2] and scores[3] <= scores[1]  # +1 is one rank below


def test_shuffled_mosaics_are_the_mosaics_with_their_quarters_exchanged():
    plain = uint8(INITIALISERS["mosaic"](start(), *ALL))
    for flip in (False, True):
        shuffled = uint8(INITIALISERS["mosaic_shuffled"](start(flip=flip), *ALL))
        moved = mirrored = 0
        for one, other in zip(plain, shuffled, strict=True):
            tiles = {t.tobytes() for t in quarters(one)}
            flipped = {t[:, ::-1].tobytes() for t in quarters(one)}
            now = {t.tobytes() for t in quarters(other)}
            assert now == tiles or (flip and now == flipped)
            mirrored += now == flipped
            moved += not np.array_equal(one, other)
        assert moved > 6 and (mirrored > 2) == flip


def test_tiles_by_hand():
    image = np.arange(16).reshape(4, 4, 1)
    turned = initialise.shuffle_tiles(image, np.array([3, 0, 1, 2]))
    expected = [[10, 11, 0, 1], [14, 15, 4, 5], [2, 3, 8, 9], [6, 7, 12, 13]]
    np.testing.assert_array_equal(turned[..., 0], expected)


def test_boxes_are_squares_inside_with_a_uniform_area():
    draw = np.random.default_rng(0)
    boxes = np.array([initialise.random_box(draw, 100, 100) for _ in range(4000)])
    assert (boxes[:, 2] == boxes[:, 3]).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 100).all()
    share = boxes[:, 2] ** 2 / 1e4
    np.testing.assert_allclose(np.quantile(share, [0, 0.5, 1]), [0.08, 0.54, 1.0], atol=0.03)
    of_side = draw.uniform(0.08**0.5, 1, 4000) ** 2  # twin: a uniform side
    assert abs(np.quantile(of_side, 0.5) - 0.54) > 0.1
    # A narrow strip fits no square of most areas: the centre is left.
    strip = initialise.random_box(np.random.default_rng(1), 2, 100)
    assert strip == Box(0, 49, 2, 2)


def test_too_few_images_are_said_with_the_way_out():
    with pytest.raises(UserError, match="2 x 2 patches at recover.ipc=7 need 28 images"):
        INITIALISERS["mosaic"](start(ipc=7), *ALL)
    for name in ("real_median", "real_herding", "real_group_hardest"):
        with pytest.raises(UserError, match="25 training images of every class are asked for"):
            INITIALISERS[name](start(ipc=25), *ALL)


# --- the scorer -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in INITIALISERS if n not in ("noise", "folder")])
def test_a_short_class_begins_again_where_that_is_asked_for(name):
    ipc = 2 * PER_CLASS
    patches = Patches(factor=2, images=PER_CLASS, crops=1)
    given = start(ipc=ipc, patches=patches, repeat=True, flip=False)
    slots = np.arange(ipc)
    images = INITIALISERS[name](given, np.ones(ipc, np.int32), slots)
    assert len(images) == ipc
    if name != "mosaic_shuffled":  # which shuffles every slot its own way
        np.testing.assert_array_equal(images[:PER_CLASS], images[PER_CLASS:])
    with pytest.raises(UserError, match="recover.short_classes=repeat|patch_images"):
        INITIALISERS[name](
            dataclasses.replace(given, repeat=False, found={}), np.ones(ipc, np.int32), slots
        )


def test_a_class_without_images_is_never_made_up():
    given = start(ipc=1, patches=Patches(1, 5, 1), scorer=brightness, repeat=True)
    with pytest.raises(UserError, match=r"no training image: class \d+;"):
        initialise.real(given, np.array([CLASSES]), np.array([0]))


def test_a_scorer_is_the_log_probability_of_images_in_the_middle():
    module = TwoConvs(num_classes=CLASSES)
    variables = random_variables(module, (SIZE, SIZE, 3), 0)
    teacher = describe("a", module, (SIZE, SIZE, 3))
    score = initialise.scorer(teacher, variables, COLOUR, SIZE)
    small = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    shown = np.zeros((5, SIZE, SIZE, 3), np.float32)
    shown[:, 2:6, 2:6] = pixels.normalise(small, COLOUR)
    logits = np.asarray(module.apply(variables, shown), np.float64)
    expected = logits[:, 2] - np.log(np.exp(logits).sum(1))
    np.testing.assert_allclose(score(small, 2), expected, rtol=1e-4)
    np.testing.assert_array_equal(score(small[3:], 2), score(small, 2)[3:])
    many = np.concatenate([small] * 41)  # more than are read at a time
    np.testing.assert_allclose(score(many, 2), np.tile(expected, 41), rtol=1e-4)


def test_only_scoring_initialisers_need_a_scorer():
    for name in INITIALISERS:
        needs = name in initialise.SCORING
        try:
            INITIALISERS[name](dataclasses.replace(start(), scorer=None), *ALL)
        except AssertionError:
            assert needs
        else:
            assert not needs


def test_random_real_images_are_of_their_class_unrepeated_and_of_the_seed():
    """The control that every accuracy stands beside."""
    labels = np.array([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 2, 1, 0, 2, 1] * 4)
    source = SimpleNamespace(labels_N=labels, class_names=None)
    classes, slots = (x.ravel() for x in np.mgrid[:3, :10])
    found = np.array(random_positions(source, classes, slots, seed=0))
    assert (labels[found] == classes).all()
    assert len(set(found.tolist())) == len(found)
    other = np.array(random_positions(source, classes, slots, seed=1))
    assert (labels[other] == classes).all() and len(set(found) & set(other)) < len(found)
    # Shuffled: the first of a class are not the first that are stored.
    first = np.concatenate([np.flatnonzero(labels == k)[:10] for k in range(3)])
    assert set(found.tolist()) != set(first.tolist())
    # Whichever are asked for, in whatever order, they are the same.
    some = [7, 25, 3]
    again = random_positions(source, classes[some], slots[some], seed=0)
    assert again == found[some].tolist()
    with pytest.raises(UserError, match="class"):
        random_positions(source, np.array([1]), np.array([labels.tolist().count(1)]), seed=0)
