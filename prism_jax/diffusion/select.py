"""Which of several candidates become the images of a class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from prism_jax.errors import UserError


class Selected(NamedTuple):
    """Candidates by their index, the best first, and how many of them the teacher recognises."""

    index_S: np.ndarray
    recognised: int


def most_confident(logits_NK: np.ndarray, label: int, count: int) -> Selected:
    """Those that a teacher recognises, the surest first (CaO2, arXiv 2506.22637).

    Where too few are recognised, those nearest to it come after them: the surest of their class.
    Equals keep their order.

    Args:
      logits_NK: of the N candidates of one class, over the data set's classes.

    Raises:
      UserError: fewer candidates than images wanted, or logits that are not finite.
    """
    if count > len(logits_NK):
        raise UserError(
            f"{count} images of class {label} are to be chosen of {len(logits_NK)} candidates; "
            f"generate at least as many candidates as images"
        )
    logits_NK = np.asarray(logits_NK, np.float64)
    if not np.isfinite(logits_NK).all():
        raise UserError(
            f"the teacher's logits of the candidates of class {label} are not finite; the "
            f"candidates or the teacher's weights are damaged"
        )
    shifted = logits_NK - logits_NK.max(1, keepdims=True)
    sure_N = shifted[:, label] - np.log(np.exp(shifted).sum(1))
    right_N = logits_NK.argmax(1) == label
    order = np.lexsort((-sure_N, ~right_N))[:count]
    return Selected(order, int(right_N[order].sum()))
