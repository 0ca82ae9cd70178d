"""What generated images are worth before a student sees them.

Two faults hide from one another: images that nobody recognises, and training images come back.
A judge trained apart finds the first, distances to the training set the second.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from prism_jax.errors import UserError

CHUNK = 256  # images whose distances are taken together, to eight times as many others
RECOGNISED = 0.95
DISTANCE = (0.9, 1.1)
NEAR, NEAREST = 0.02, 0.01


class Quality(NamedTuple):
    """Of generated images.

    Attributes:
      recognised: the share that the judge takes for their class.
      distance: their median distance to the nearest training image, over that of test images; None
        where at least half of the test images are training images.
      near: the share nearer to one than the nearest 1 % of test images are.
    """

    recognised: float
    distance: float | None
    near: float

    @property
    def faults(self) -> tuple[str, ...]:
        """What is not as it should be, in words."""
        found = []
        if self.recognised < RECOGNISED:
            found.append(f"recognised {self.recognised:.1%}, at least {RECOGNISED:.0%} wanted")
        if self.distance is None:
            found.append("distance unknown, for half of the test images are training images")
        elif not DISTANCE[0] <= self.distance <= DISTANCE[1]:
            found.append(f"distance {self.distance:.2f}, {DISTANCE[0]} to {DISTANCE[1]} wanted")
        if self.near >= NEAR:
            found.append(f"near a training image {self.near:.1%}, under {NEAR:.0%} wanted")
        return tuple(found)


def quality(
    images: np.ndarray,
    predicted_N: np.ndarray,
    labels_N: np.ndarray,
    *,
    train: np.ndarray,
    test: np.ndarray,
) -> Quality:
    """Measure generated images.

    Args:
      images, train, test: of equal shape but for their number, in any one scale.
      predicted_N: the judge's classes of the generated images, ``labels_N`` those they should be.

    Raises:
      UserError: images that are not finite, or an empty set.
    """
    if not (len(images) and len(train) and len(test)):
        raise UserError(
            f"quality needs generated, training and test images; got {len(images)}, {len(train)} "
            f"and {len(test)}"
        )
    if not np.isfinite(images).all():
        raise UserError("generated images are not finite; their quality cannot be measured")
    of_images, of_test = nearest(images, train), nearest(test, train)
    usual = np.median(of_test)
    return Quality(
        float(np.mean(np.asarray(predicted_N) == np.asarray(labels_N))),
        float(np.median(of_images) / usual) if usual else None,
        float(np.mean(of_images < np.quantile(of_test, NEAREST))),
    )


def nearest(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Euclidean distance from each image to the nearest of others, float64."""
    rows, others = (np.asarray(x).reshape(len(x), -1) for x in (images, among))
    found = np.full(len(rows), np.inf)
    for at in range(0, len(rows), CHUNK):
        chunk = rows[at : at + CHUNK].astype(np.float64)
        for first in range(0, len(others), 8 * CHUNK):
            block = others[first : first + 8 * CHUNK].astype(np.float64)
            # The nearest by the expanded square, its distance by the plain one: 0 for a copy.
            index = ((block**2).sum(1) - 2 * chunk @ block.T).argmin(1)
            distances = np.sqrt(((chunk - block[index]) ** 2).sum(1))
            found[at : at + CHUNK] = np.minimum(found[at : at + CHUNK], distances)
    return found
