"""Which images every shadow run has, and the files it is made from."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from etils import epath

from prism_jax import rng
from prism_jax.analysis.membership import FEWEST
from prism_jax.data import workdir
from prism_jax.errors import UserError


class Plan(NamedTuple):
    """Positions in the training split.

    Attributes:
      canaries_N: class by class.
      member_RN: which run trains on which; runs 2j and 2j + 1 are complements.
      without: of each run, as many others as it has canaries, of the same classes; no canary.
      always_M: others that every run has, of either kind.
    """

    canaries_N: np.ndarray
    member_RN: np.ndarray
    without: tuple[np.ndarray, ...]
    always_M: np.ndarray

    def chosen(self, run: int, kind: str) -> np.ndarray:
        """What a run trains on, in the order of the split: of "members", or "without" canaries."""
        own = self.canaries_N[self.member_RN[run]] if kind == "members" else self.without[run]
        return np.sort(np.concatenate([own, self.always_M]))

    def exchanged(
        self, run: int, cls: int, labels_N: np.ndarray, spared: Collection[int] = ()
    ) -> np.ndarray:
        """What a run trains on, but for one canary of a class: another one stands in its place.

        Args:
          spared: positions that are not exchanged.

        Raises:
          UserError: all canaries of the class that the run has are spared.
        """
        mine_N = labels_N[self.canaries_N] == cls
        members = self.canaries_N[mine_N & self.member_RN[run]]
        kept = [int(at) for at in members if at not in spared]
        if not kept:
            raise UserError(
                f"the {len(members)} canaries of class {cls} in run {run} all start synthetic "
                f"images, and none is left whose exchange says something else; raise canaries"
            )
        inside = kept[-1]
        outside = self.canaries_N[mine_N & ~self.member_RN[run]][-1]
        found = self.chosen(run, "members")
        return np.where(found == inside, outside, found)


def plan_of(labels_N: np.ndarray, *, canaries: int, always: int, runs: int, seed: int) -> Plan:
    """Draw the canaries and their runs; more runs keep what fewer have.

    Args:
      canaries: of each class; always: other images of each class that every run has.

    Raises:
      UserError: odd numbers, too few runs, or a class with too few images.
    """
    if runs < FEWEST or runs % 2:
        raise UserError(f"shadows is {runs}; it must be even, and at least {FEWEST}")
    if canaries < 2 or canaries % 2 or always < 0:
        raise UserError(
            f"canaries is {canaries} and always is {always}, of each class; canaries must be even "
            f"and at least 2, always at least 0"
        )
    needed, half = canaries + always + canaries // 2, canaries // 2
    counts_K = np.bincount(labels_N)
    if counts_K.min() < needed:
        raise UserError(
            f"class {counts_K.argmin()} has {counts_K.min()} training images, and {needed} of "
            f"every class are asked for: canaries ({canaries}), as many others as a run has of "
            f"them ({half}), and always ({always}); lower canaries or always"
        )
    chosen, member, outside, common = [], [], [], []
    for cls in range(len(counts_K)):
        order = rng.generator(seed, "audit/canaries", cls).permutation(
            np.flatnonzero(labels_N == cls)
        )
        chosen.append(np.sort(order[:canaries]))
        common.append(order[canaries : canaries + always])
        others = order[canaries + always :]
        member_RC = np.zeros((runs, canaries), bool)
        for pair in range(runs // 2):
            first = rng.generator(seed, "audit/members", pair, cls).permutation(canaries)[:half]
            member_RC[2 * pair, first] = True
            member_RC[2 * pair + 1] = ~member_RC[2 * pair]
        member.append(member_RC)
        outside.append(
            [rng.generator(seed, "audit/without", r, cls).permutation(others)[:half]
             for r in range(runs)]
        )  # fmt: skip
    return Plan(
        np.concatenate(chosen),
        np.concatenate(member, axis=1),
        tuple(np.concatenate(of_run) for of_run in zip(*outside, strict=True)),
        np.concatenate(common),
    )


class Split(NamedTuple):
    """A split of the real images, in memory, and a digest of what they are."""

    images_uint8_NHWC: np.ndarray
    labels_N: np.ndarray
    digest: str


def write(path: epath.Path, train: Split, test: Split, at_N: np.ndarray) -> epath.Path:
    """An archive of the source "npz" with a part of the training images; kept if it is there."""
    if not path.exists():
        buffer = io.BytesIO()
        np.savez(
            buffer,
            train_images=train.images_uint8_NHWC[at_N],
            train_labels=train.labels_N[at_N],
            test_images=test.images_uint8_NHWC,
            test_labels=test.labels_N,
        )
        workdir.write_bytes(path, buffer.getvalue())
    return path
