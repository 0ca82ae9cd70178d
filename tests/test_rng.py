from __future__ import annotations

import jax
import numpy as np
import pytest

from prism_jax import rng


def bits(key) -> bytes:
    return np.asarray(jax.random.key_data(key)).tobytes()


def test_a_stream_is_its_address_whatever_was_drawn_before():
    key = rng.root(3)
    before = bits(rng.stream(key, "recover/view", 1, 2, 3))
    for step in range(5):
        jax.random.normal(rng.stream(key, "recover/view", 1, 2, step), (4,), "float32")
    assert bits(rng.stream(rng.root(3), "recover/view", 1, 2, 3)) == before


def test_seeds_names_coordinates_and_their_number_are_all_part_of_the_address():
    addresses = [("a",), ("b",), ("a", 0), ("a", 1), ("a", 0, 0), ("a", 0, 1), ("a", 1, 0)]
    keys = {bits(rng.stream(rng.root(seed), *address)) for seed in (0, 1) for address in addresses}
    assert len(keys) == 2 * len(addresses)
    sums = {sum(address[1:]) for address in addresses}  # twin: an address by the sum collides
    assert len(sums) < len(addresses)


def test_python_ints_and_traced_scalars_give_the_same_key():
    def draw(step):
        return jax.random.key_data(rng.stream(rng.root(0), "recover/view", step))

    for step in (0, 7, 2**31 - 1):
        np.testing.assert_array_equal(jax.jit(draw)(np.int32(step)), draw(step))


def test_keys_are_threefry_whatever_the_default_is():
    ours = rng.root(0)
    with jax.default_prng_impl("rbg"):
        assert bits(rng.root(0)) == bits(ours)
        assert jax.random.key_data(jax.random.key(0)).size == 4  # twin: the default has changed


def test_x64_mode_changes_no_stream():
    ours = bits(rng.stream(rng.root(5), "relabel/view", 3, 4))
    draw = np.asarray(jax.random.uniform(rng.root(5), (3,), "float32"))
    with jax.enable_x64(True):
        assert bits(rng.stream(rng.root(5), "relabel/view", 3, 4)) == ours
        np.testing.assert_array_equal(jax.random.uniform(rng.root(5), (3,), "float32"), draw)
        nameless = np.asarray(jax.random.uniform(rng.root(5), (3,)))
    assert not np.array_equal(nameless, draw)  # twin: a draw that does not name its dtype


def test_the_same_address_on_the_host():
    def order(*address):
        return rng.generator(*address).permutation(50).tolist()

    assert order(0, "order", 1) == order(0, "order", 1)
    others = [order(1, "order", 1), order(0, "other", 1), order(0, "order", 2), order(0, "order")]
    assert all(other != order(0, "order", 1) for other in others)


@pytest.mark.parametrize("seed", [0, np.uint32(0), 2**32 - 1])
def test_a_seed_may_be_any_uint32(seed):
    assert bits(rng.root(seed)) == bits(jax.jit(rng.root)(np.uint32(seed)))
