from __future__ import annotations

import itertools

import pytest

from prism_jax.core.batching import Pass, fits, most_devices, passes, sizes, spares


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (50, {}, [Pass(0, 50, (50,), (50,))]),
        # PRISM: two parts of 25, one after the other, or beside one another on two devices.
        (50, {"accumulate": 2}, [Pass(0, 25, (25,), (25,)), Pass(25, 50, (25,), (25,))]),
        (50, {"accumulate": 2, "devices": 2}, [Pass(0, 50, (25, 25), (25, 25))]),
        (50, {"bn_group": 25}, [Pass(0, 50, (50,), (25, 25))]),
        (8, {"accumulate": 2, "bn_group": 2}, [Pass(0, 4, (4,), (2, 2)), Pass(4, 8, (4,), (2, 2))]),
        (8, {"accumulate": 4, "devices": 2},
         [Pass(0, 4, (2, 2), (2, 2)), Pass(4, 8, (2, 2), (2, 2))]),
        (8, {"accumulate": 2, "bn_group": 1, "devices": 4}, [Pass(0, 8, (4, 4), (1,) * 8)]),
        # What does not divide is divided as equally as can be.
        (7, {"accumulate": 2}, [Pass(0, 4, (4,), (4,)), Pass(4, 7, (3,), (3,))]),
        (30, {"bn_group": 25}, [Pass(0, 30, (30,), (15, 15))]),
        (31, {"bn_group": 25}, [Pass(0, 31, (31,), (16, 15))]),
        # No image is a group of its own, unless that was asked for or it is alone.
        (2, {"accumulate": 5}, [Pass(0, 2, (2,), (2,))]),
        (3, {"accumulate": 2}, [Pass(0, 3, (3,), (3,))]),
        (5, {"accumulate": 4}, [Pass(0, 3, (3,), (3,)), Pass(3, 5, (2,), (2,))]),
        (5, {"bn_group": 2}, [Pass(0, 5, (5,), (3, 2))]),
        (26, {"bn_group": 25}, [Pass(0, 26, (26,), (13, 13))]),
        (3, {"bn_group": 1}, [Pass(0, 3, (3,), (1, 1, 1))]),
        (1, {"accumulate": 2}, [Pass(0, 1, (1,), (1,))]),
    ],
)  # fmt: skip
def test_batches_by_hand(size, options, expected):
    assert list(passes(size, **options)) == expected


SIZES, PARTS, GROUPS = (1, 6, 24, 25, 50), (1, 2, 3, 4), (None, 1, 2, 3, 25)


@pytest.mark.parametrize(("accumulate", "bn_group"), list(itertools.product(PARTS, GROUPS)))
def test_any_number_of_devices_sees_the_same_groups_and_parts_in_the_same_order(
    accumulate, bn_group
):
    options = {"accumulate": accumulate, "bn_group": bn_group}
    for size in SIZES:
        one = passes(size, **options)
        for devices in range(1, 9):
            if not fits(size, devices, **options):
                continue
            found = passes(size, devices=devices, **options)
            assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])]
            assert found[-1].stop == size
            assert sum((p.groups for p in found), ()) == sum((p.groups for p in one), ())
            assert sum((p.parts for p in found), ()) == sum((p.parts for p in one), ())
            assert all(sum(p.groups) == sum(p.parts) == p.stop - p.start for p in found)
            groups = sum((p.groups for p in found), ())
            assert max(groups) <= (bn_group or size) + (bn_group == 2)
            assert min(groups) > 1 or 1 in (bn_group, size)
            if devices > 1:
                # A device holds no more than one device would, and whole groups (or one group is
                # the whole batch).
                assert all((p.stop - p.start) % devices == 0 for p in found)
                assert max(p.stop - p.start for p in found) // devices <= size // accumulate
                assert found[0].groups == (size,) or len(found[0].groups) % devices == 0


def test_how_many_devices_can_share_a_batch():
    assert most_devices(50, 8, accumulate=2) == 2
    assert most_devices(50, 1, accumulate=2) == 1
    assert most_devices(50, 8, accumulate=2, bn_group=5) == 5
    assert most_devices(256, 8) == 8  # one group: by images
    assert most_devices(50, 8) == 5
    assert most_devices(51, 8, accumulate=2) == 1  # ragged
    assert not fits(50, 4, accumulate=2) and not fits(50, 2, accumulate=1, bn_group=20)
    assert not fits(3, 2, accumulate=3)
    assert not fits(4, 4, accumulate=4)  # two groups of two: no device would hold a whole one


def test_the_sizes_of_an_epoch_s_batches():
    assert sizes(100, 50) == (50,)
    assert sizes(101, 50) == (50, 1)
    assert sizes(20, 50) == (20,)


def test_an_equal_division_that_would_leave_an_image_alone_is_told():
    assert spares(2, accumulate=2) and spares(3, bn_group=2) and spares(5, accumulate=4)
    assert not spares(50, accumulate=2) and not spares(31, bn_group=25)
    assert not spares(3, bn_group=1) and not spares(1)  # asked for, or nobody to join
