from __future__ import annotations

import numpy as np
import pytest

from prism_jax.core.codec import PRECISIONS, Coding, decode, encode

CODINGS = [Coding(precision, top_k) for precision in PRECISIONS for top_k in (None, 1, 3)]


def logits(rows: int = 40, classes: int = 11, spread: float = 4.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, classes)) * spread + rng.normal(size=(rows, 1))).astype("f4")


def there_and_back(logits_BK: np.ndarray, coding: Coding) -> np.ndarray:
    found = decode(encode(logits_BK, coding), logits_BK.shape[1])
    assert found.dtype == np.float32 and found.shape == logits_BK.shape
    return found


def by_hand(logits_BK: np.ndarray, coding: Coding, *, symmetric=False, fill="mean") -> np.ndarray:
    """Row by row and in float64, with two ways to be wrong."""
    result = np.empty(logits_BK.shape)
    for row, out in zip(logits_BK.astype(np.float64), result, strict=True):
        kept = sorted(range(len(row)), key=lambda k: (-row[k], k))[: coding.top_k]
        dropped = [row[k] for k in range(len(row)) if k not in kept]
        values = row[kept]
        if coding.precision == "float16":
            values = values.astype(np.float16)
        elif coding.precision == "int8":
            middle, step = (values.max() + values.min()) / 2, np.ptp(values) / 254
            if symmetric:
                middle, step = 0.0, np.abs(values).max() / 127
            values = middle + step * np.round((values - middle) / (step or 1))
        if dropped:
            out[:] = np.mean(dropped) if fill == "mean" else min(values)
        out[kept] = values
    return result


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_against_float64_row_by_row(coding):
    expected = by_hand(logits(), coding)
    found = there_and_back(logits(), coding)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
    if coding.precision == "int8" and coding.top_k != 1:
        assert np.abs(by_hand(logits(), coding, symmetric=True) - found).max() > 1e-2
    if coding.top_k:
        assert np.abs(by_hand(logits(), coding, fill="least") - found).max() > 1e-2


def test_int8_is_half_a_scale_off_at_most_and_reaches_both_ends():
    rows_B = encode(logits(classes=300), Coding("int8"))
    off = np.abs(decode(rows_B, 300) - logits(classes=300)) / rows_B["scale"][:, None]
    assert 0.49 < off.max() < 0.501
    assert (rows_B["values"].min(1) == -127).all() and (rows_B["values"].max(1) == 127).all()


def test_pruning_keeps_the_sum_and_the_largest():
    """The fill is the mean of what was dropped, so that a row's mean stays."""
    exact, pruned = logits(), there_and_back(logits(), Coding("float32", 3))
    np.testing.assert_allclose(pruned.sum(1), exact.sum(1), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(pruned.argmax(1), exact.argmax(1))
    assert [len(np.unique(row)) for row in pruned] == [4] * len(pruned)


def test_where_logits_tie_the_lower_class_is_kept():
    row = np.float32([[1, 5, 2, 2, 2, 0]])
    np.testing.assert_array_equal(
        there_and_back(row, Coding("float32", 3)), np.float32([[1, 5, 2, 2, 1, 1]])
    )


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_rows_of_equal_logits_and_huge_ones(coding):
    equal = np.full((2, 7), 3.25, np.float32)
    np.testing.assert_array_equal(there_and_back(equal, coding), equal)
    if coding.precision != "float16":  # the range is wider than the largest float32
        huge = np.float32([[-3e38, 3e38, 0, 1, 2, 3, 4]])
        assert np.isfinite(there_and_back(huge, coding)).all()


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_what_is_not_finite_is_refused(coding, value):
    bad = logits()
    bad[3, 4] = value
    if np.isfinite(value) and coding.precision != "float16":
        assert there_and_back(bad, coding)[3, 4] == np.float32(value)
    else:
        with pytest.raises(ValueError, match=f"not finite in {coding.precision}"):
            encode(bad, coding)


def test_a_row_is_as_small_as_it_says():
    sizes = {
        ("float32", None): 4000, ("float16", None): 2000, ("int8", None): 1008,
        ("float16", 100): 125 + 4 + 200, ("int8", 100): 125 + 4 + 8 + 100,
    }  # fmt: skip
    found = {key: Coding(*key).row(1000).itemsize for key in sizes}
    assert found == sizes


def test_a_second_time_changes_nothing():
    """What was rounded and pruned once is a fixed point, but for the last bits of int8's scale."""
    for coding in CODINGS:
        once = there_and_back(logits(), coding)
        np.testing.assert_allclose(there_and_back(once, coding), once, rtol=1e-5, atol=1e-5)
