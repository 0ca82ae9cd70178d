"""Which candidates become images."""

from __future__ import annotations

import numpy as np
import pytest

from prism_jax.diffusion.select import most_confident
from prism_jax.errors import UserError

LOGITS = np.log([
    [0.6, 0.3, 0.1],  # recognised
    [0.3, 0.6, 0.1],
    [0.9, 0.05, 0.05],  # recognised, surest
    [0.45, 0.5, 0.05],  # not, but surer of class 0 than the first of them
    [0.35, 0.33, 0.32],  # recognised, hardly: less sure of class 0 than one that is not
])  # fmt: skip


def test_the_recognised_come_first_and_the_surest_of_them():
    found = most_confident(LOGITS, 0, 3)
    assert found.index_S.tolist() == [2, 0, 4] and found.recognised == 3


def test_too_few_are_followed_by_those_nearest_to_it():
    found = most_confident(LOGITS, 0, 5)
    assert found.index_S.tolist() == [2, 0, 4, 3, 1] and found.recognised == 3


def test_scale_and_shift_of_a_row_change_what_probabilities_say():
    shifted = LOGITS + np.arange(5)[:, None]
    assert most_confident(shifted, 0, 5).index_S.tolist() == [2, 0, 4, 3, 1]
    by_logit = np.lexsort((-shifted[:, 0], shifted.argmax(1) != 0))  # twin: the logit alone
    assert by_logit.tolist() != [2, 0, 4, 3, 1]


def test_equals_keep_their_order():
    assert most_confident(np.zeros((4, 2)), 0, 3).index_S.tolist() == [0, 1, 2]
    assert most_confident(np.zeros((4, 2)), 1, 3).recognised == 0  # a tie goes to the lower class


def test_refused():
    with pytest.raises(UserError, match="6 images of class 0 .* of 5 candidates"):
        most_confident(LOGITS, 0, 6)
    with pytest.raises(UserError, match="class 0 are not finite"):
        most_confident(np.full((5, 3), np.nan), 0, 2)
