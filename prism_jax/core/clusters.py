"""Clusters of a class in some space, on the host.

In float64 and on one thread, since scikit-learn adds up what each thread has found: so the bits
do not depend on the number of threads. (Another processor's linear algebra may round otherwise.)
"""

from __future__ import annotations

import numpy as np

from prism_jax import environment


def kmeans(rows_ND: np.ndarray, count: int, *, random_state: int) -> np.ndarray:
    """The distances (N, I) of rows to I centres, all rows at once, until nothing moves."""
    from sklearn.cluster import KMeans  # takes a second to import
    from sklearn.metrics import pairwise_distances

    rows_ND = np.asarray(rows_ND, np.float64)
    with environment.one_thread():
        model = KMeans(count, n_init=1, random_state=random_state).fit(rows_ND)
        return pairwise_distances(rows_ND, model.cluster_centers_)


def nearest_members(distances_NI: np.ndarray, owner_N: np.ndarray) -> np.ndarray:
    """For each centre the nearest of its own rows; of all that are left where it has none.

    Args:
      distances_NI: of rows to centres.
      owner_N: the centre that each row belongs to.

    Returns:
      (I,) positions, all different.
    """
    nearest_I = np.full(distances_NI.shape[1], -1)
    for only_own in (True, False):
        for centre in np.flatnonzero(nearest_I < 0):
            free = ~np.isin(np.arange(len(owner_N)), nearest_I)
            if only_own:
                free &= owner_N == centre
            if free.any():
                candidates = np.flatnonzero(free)
                nearest_I[centre] = candidates[distances_NI[candidates, centre].argmin()]
    return nearest_I
