"""Anchors of a class, on clusters made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_info, threadpool_limits

from prism_jax import environment
from prism_jax.diffusion import anchors as anchors_module
from prism_jax.diffusion.anchors import Anchors, Clustering, anchors
from prism_jax.errors import UserError

CENTRES = np.array([[0, 0, 0, 0], [9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 9]], np.float32)
SIZES = (40, 20, 10, 5)
CLUSTERING_MODES = [mode for mode in anchors_module.MODES if mode not in ("none", "medoid")]


def clusters(sizes=SIZES, spread: float = 0.1, seed: int = 0) -> np.ndarray:
    """Latents (N, 2, 2, 1) around known centres, in random order."""
    draw = np.random.default_rng(seed)
    rows = np.concatenate([
        centre + spread * draw.normal(size=(size, 4))
        for centre, size in zip(CENTRES, sizes, strict=True)
    ])  # fmt: skip
    return draw.permutation(rows).astype(np.float32).reshape(-1, 2, 2, 1)


def of(mode: str, latents: np.ndarray, ipc: int = 4, **numbers) -> Anchors:
    seed, cls = numbers.pop("seed", 0), numbers.pop("cls", 0)
    return anchors(Clustering(mode, **numbers), latents, ipc, seed=seed, cls=cls)


def far(found: Anchors, centres=CENTRES) -> float:
    """How far the known centre that is worst served is from an anchor."""
    rows = found.latents_IHWC.reshape(len(found.latents_IHWC), -1)
    return max(np.linalg.norm(rows - centre, axis=1).min() for centre in centres)


@pytest.mark.parametrize("mode, expand", [
    ("kmeans", 10), ("minibatch", 10), ("chunked", 10), ("chunked_released", 5), ("medoid", 10),
])  # fmt: skip
def test_known_clusters_are_found_with_their_sizes(mode, expand):
    attempts = 1 if mode.startswith("chunked") else 10
    found = of(mode, clusters(), expand=expand, attempts=attempts)
    assert found.latents_IHWC.shape == (4, 2, 2, 1) and found.latents_IHWC.dtype == np.float32
    assert far(found) < 0.3
    assert sorted(found.sizes_I, reverse=True) == list(SIZES)


def test_a_centre_is_the_mean_of_its_cluster():
    latents = clusters()
    found = of("kmeans", latents, attempts=10)
    rows, centres = (x.reshape(len(x), -1) for x in (latents, found.latents_IHWC))
    owner = np.linalg.norm(rows[:, None] - centres, axis=-1).argmin(1)
    for i, centre in enumerate(centres):
        np.testing.assert_allclose(centre, rows[owner == i].mean(0), atol=1e-5)
        distances = np.linalg.norm(rows - centre, axis=1)
        assert found.nearest_I[i] == distances.argmin()


def test_medoids_are_the_nearest_real_latents():
    latents = clusters()
    plain, medoids = of("kmeans", latents), of("medoid", latents)
    assert np.array_equal(medoids.nearest_I, plain.nearest_I)
    assert np.array_equal(medoids.latents_IHWC, latents[medoids.nearest_I])
    assert not np.array_equal(medoids.latents_IHWC, plain.latents_IHWC)


def test_what_is_left_over_is_dropped_as_released_or_taken():
    # One chunk of eight around two centres, then two latents far away.
    draw = np.random.default_rng(0)
    rows = np.concatenate([draw.normal(size=(8, 4)) * 0.1, np.full((2, 4), 50.0)])

    def moved(mode: str) -> float:
        task = anchors_module.Task(Clustering(mode, expand=4), rows, 2, 0)
        return float(np.abs(anchors_module.MODES[mode](task)).max())

    assert moved("chunked_released") < 1 < moved("chunked")


def test_chunks_of_ipc_latents_begin_as_the_first_of_them():
    # D4M's script: km_expand 1, and as many latents as there are prototypes.
    latents = clusters()[:4]
    found = of("chunked_released", latents, expand=1)
    assert np.array_equal(
        np.sort(found.latents_IHWC.reshape(4, -1), 0), np.sort(latents.reshape(4, -1), 0)
    )


def test_as_many_anchors_as_images_are_the_images():
    latents = clusters((2, 2, 2, 2))
    for mode in ("kmeans", "chunked", "medoid"):
        found = of(mode, latents, ipc=8)
        assert sorted(found.nearest_I) == list(range(8)) and (found.sizes_I == 1).all()
        np.testing.assert_allclose(found.latents_IHWC, latents[found.nearest_I], atol=1e-6)


def test_equal_images_still_have_medoids_of_their_own():
    with pytest.warns(ConvergenceWarning, match="distinct clusters"):
        found = of("medoid", np.ones((5, 2, 2, 1), np.float32), ipc=3)
    assert len(set(found.nearest_I)) == 3 and found.sizes_I.sum() == 5


def test_a_centre_that_stands_twice_gives_way_to_a_real_latent(monkeypatch):
    """Else its image would weigh nothing (DDOQ), and be another's double (D4M)."""
    rows = clusters()
    flat = rows.reshape(len(rows), -1)
    twice = np.concatenate([flat[:1], flat[:1], flat[30:31], flat[60:61]])
    monkeypatch.setitem(anchors_module.MODES, "minibatch", lambda task: twice.copy())
    found = anchors(Clustering("minibatch"), rows, 4, seed=0, cls=0)
    assert found.sizes_I.min() > 0 and found.sizes_I.sum() == len(rows)
    assert len({latent.tobytes() for latent in found.latents_IHWC}) == 4
    assert len(set(found.nearest_I.tolist())) == 4
    np.testing.assert_array_equal(found.latents_IHWC[0].ravel(), twice[0])  # the first stays


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("mode", ["kmeans", "minibatch", "medoid"])
def test_copies_of_an_image_share_its_rows(mode):
    """The second of two equal centres would lose every tie, and its image would weigh nothing."""
    rows = clusters((3, 3, 3, 3))
    rows[1] = rows[2] = rows[0]
    found = of(mode, rows, ipc=12)
    assert found.sizes_I.tolist() == [1] * 12 and sorted(found.nearest_I) == list(range(12))
    fewer = of(mode, np.repeat(rows[:1], 5, 0), ipc=3)  # all are one
    assert sorted(fewer.sizes_I.tolist()) == [1, 2, 2] and len({*fewer.nearest_I}) == 3
    distinct = np.random.default_rng(0).random((9, 4))
    assert (anchors_module._owners(distinct) == distinct.argmin(1)).all()  # the rule, as it was


def test_without_anchors_any_number_and_equal_shares():
    found = of("none", clusters()[:3], ipc=7)
    assert not found.latents_IHWC.any() and found.latents_IHWC.shape == (7, 2, 2, 1)
    assert found.sizes_I.tolist() == [1] * 7


def test_images_that_lie_apart_are_left_out():
    latents = clusters((40, 40, 40, 40))
    latents[7] = 100.0
    latents[90] = -100.0
    rows = latents.reshape(len(latents), -1).astype(np.float64)
    kept = anchors_module.inliers(rows, 2 / 160)
    assert set(range(160)) - set(kept) == {7, 90}
    with_them, without = (of("kmeans", latents, outliers=share) for share in (0.0, 2 / 160))
    assert np.abs(with_them.latents_IHWC).max() > 50 > np.abs(without.latents_IHWC).max()
    assert with_them.sizes_I.sum() == 160 and without.sizes_I.sum() == 158
    assert not {7, 90} & set(without.nearest_I)


@pytest.mark.parametrize("count", [2, 3, 4, 31, 100])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.07, 0.1, 0.5])
def test_how_many_are_left_is_known_before(count, share):
    rows = np.random.default_rng(0).normal(size=(count, 4))
    left = len(anchors_module.inliers(rows, share))
    assert anchors_module.fewest_inliers(count, share) == left


@pytest.mark.parametrize("mode", CLUSTERING_MODES)
def test_the_bits_do_not_depend_on_threads(mode):
    latents = np.random.default_rng(0).normal(size=(3000, 4, 4, 4)).astype(np.float32)
    found = []
    for threads in (1, 2, 8):
        with threadpool_limits(threads):
            found.append(of(mode, latents, ipc=10, outliers=0.1))
    assert len({x.latents_IHWC.tobytes() for x in found}) == 1
    assert len({x.nearest_I.tobytes() for x in found}) == 1


def test_without_the_limit_sums_depend_on_threads():
    if environment.cores() == 1:
        pytest.skip("this process may use one core")
    rows = np.random.default_rng(0).normal(size=(3000, 64))
    task, found = anchors_module.Task(Clustering(), rows, 10, 0), []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(anchors_module.kmeans(task))
    assert found[0].tobytes() != found[1].tobytes()


def test_the_threads_are_limited_while_it_runs(monkeypatch):
    seen = []

    def looked(task):
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return task.latents_ND[: task.ipc]

    monkeypatch.setitem(anchors_module.MODES, "kmeans", looked)
    of("kmeans", clusters())
    assert seen and set(seen) == {1}


def test_a_class_is_drawn_by_its_own_address():
    latents = np.random.default_rng(0).normal(size=(300, 2, 2, 1)).astype(np.float32)
    first, again = of("chunked", latents), of("chunked", latents)
    assert first.latents_IHWC.tobytes() == again.latents_IHWC.tobytes()
    for other in (dict(cls=1), dict(seed=1)):
        assert (
            of("chunked", latents, **other).latents_IHWC.tobytes() != first.latents_IHWC.tobytes()
        )


@pytest.mark.parametrize("numbers, count, said", [
    (dict(mode="spectral"), 75, "kmeans, minibatch, chunked, chunked_released, medoid, none"),
    (dict(outliers=0.6), 75, "0 to 0.5"),
    (dict(expand=0), 75, "at least 1"),
    (dict(), 3, "class 5 has 3; lower ipc"),
    (dict(outliers=0.5), 6, "class 5 has 3 without its outliers"),
    (dict(mode="chunked_released"), 39, "need 40 images"),
])  # fmt: skip
def test_refused(numbers, count, said):
    with pytest.raises(UserError, match=said):
        anchors(dataclasses.replace(Clustering(), **numbers), clusters()[:count], 4, seed=0, cls=5)


def test_latents_that_are_not_finite_are_refused():
    latents = clusters()
    latents[3] = np.inf
    with pytest.raises(UserError, match="class 0 are not finite"):
        of("kmeans", latents)
