"""The diffusion transformer: both layouts of weights, its conventions, its size."""

from __future__ import annotations

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from diffusion import parity
from helpers.compiling import only_fast_programs
from models.parity import generator

from prism_jax.diffusion import dit, huggingface
from prism_jax.errors import UserError

__all__ = ["only_fast_programs"]  # a fixture
pytestmark = pytest.mark.usefixtures("only_fast_programs")

SMALL = {"classes": 3, "channels": 1, "patch": 4, "width": 16, "depth": 2, "heads": 2}


def released(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' tensors under the released code's names, written down by hand."""
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": (
            "y_embedder.embedding_table"
        ),
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    depth = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("transformer_blocks"))
    for block in range(depth):
        old, new = f"transformer_blocks.{block}", f"blocks.{block}"
        names |= {
            f"{old}.norm1.linear": f"{new}.adaLN_modulation.1",
            f"{old}.attn1.to_out.0": f"{new}.attn.proj",
            f"{old}.ff.net.0.proj": f"{new}.mlp.fc1",
            f"{old}.ff.net.2": f"{new}.mlp.fc2",
        }
    found = {}
    for old, new in names.items():
        for leaf in ("weight", "bias"):
            if f"{old}.{leaf}" in tensors:
                found[f"{new}.{leaf}"] = tensors[f"{old}.{leaf}"]
    for block in range(depth):
        for leaf in ("weight", "bias"):
            parts = [f"transformer_blocks.{block}.attn1.to_{letter}.{leaf}" for letter in "qkv"]
            found[f"blocks.{block}.attn.qkv.{leaf}"] = np.concatenate([tensors[n] for n in parts])
    return found


def written(tmp_path, name="dit"):
    """The published directory and its tensors."""
    golden = parity.write(parity.BY_NAME[name], tmp_path / name)
    (file,) = (tmp_path / name).glob("*.safetensors")
    return tmp_path / name, safetensors.numpy.load_file(file), golden


def test_both_layouts_give_one_tree(tmp_path):
    folder, tensors, _ = written(tmp_path)
    table = {"pos_embed": dit.position_table(4, 4, 16)[None]}
    path = tmp_path / "released.safetensors"
    safetensors.numpy.save_file(released(tensors) | table, path)
    theirs, ours = (
        huggingface.load(str(path), "transformer"),
        huggingface.load(str(folder), "transformer"),
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, theirs.params, ours.params))
    # The file cannot say how many heads, and its code has its own frequencies and epsilon.
    expected = {"heads": 2, "frequency_shift": 1, "mlp_epsilon": 1e-5}
    assert theirs.module.clone(**expected) == ours.module
    # The twin: two thirds of an attention the other way round give another tree.
    swapped = dict(tensors)
    for leaf in ("weight", "bias"):
        q, k = (f"transformer_blocks.1.attn1.to_{letter}.{leaf}" for letter in "qk")
        swapped[q], swapped[k] = tensors[k], tensors[q]
    safetensors.numpy.save_file(released(swapped), path)
    other = huggingface.load(str(path), "transformer").params
    assert not jax.tree.all(jax.tree.map(np.array_equal, other, ours.params))


def test_a_fine_tuned_file_gives_its_average(tmp_path):
    torch = pytest.importorskip("torch", reason="writes a training's checkpoint by torch.save")
    _, tensors, _ = written(tmp_path)
    average = {name: torch.from_numpy(t) for name, t in released(tensors).items()}
    last = {name: t + 1 for name, t in average.items()}
    found = {"model": last, "ema": average, "opt": {"state": {}}, "args": argparse.Namespace(lr=1)}
    torch.save(found, tmp_path / "0001000.pt")
    params = huggingface.load(str(tmp_path / "0001000.pt"), "transformer").params
    bias = params["blocks.0"]["mlp.fc1"]["bias"]
    np.testing.assert_array_equal(bias, tensors["transformer_blocks.0.ff.net.0.proj.bias"])


@pytest.mark.parametrize("part", ["class_embedder.embedding_table", "timestep_embedder.linear_2"])
def test_blocks_with_embeddings_of_their_own_are_refused(part, tmp_path):
    folder, tensors, _ = written(tmp_path)
    tensors[f"transformer_blocks.1.norm1.emb.{part}.weight"][3, 2] += 1e-3
    safetensors.numpy.save_file(tensors, next(folder.glob("*.safetensors")))
    with pytest.raises(UserError, match=rf"blocks.1.*{re.escape(part)}.*must be equal"):
        huggingface.load(str(folder), "transformer")


def test_a_trained_position_table_is_refused(tmp_path):
    _, tensors, _ = written(tmp_path)
    table = dit.position_table(4, 4, 16)[None] + np.float32(1e-3)
    path = tmp_path / "released.safetensors"
    safetensors.numpy.save_file(released(tensors) | {"pos_embed": table}, path)
    with pytest.raises(UserError, match="not the fixed table"):
        huggingface.load(str(path), "transformer")


def test_a_file_says_what_latents_it_was_trained_on(tmp_path):
    """By its position table; a directory says so in its config."""
    folder, tensors, _ = written(tmp_path)
    path = tmp_path / "released.safetensors"
    assert huggingface.sample_size(str(folder), "transformer") == 8
    for rows, side in ((4, 8), (8, 16)):
        table = {"pos_embed": dit.position_table(rows, rows, 16)[None]}
        safetensors.numpy.save_file(released(tensors) | table, path)
        assert huggingface.sample_size(str(path), "transformer") == side  # patches of 2
    safetensors.numpy.save_file(released(tensors), path)
    assert huggingface.sample_size(str(path), "transformer") is None
    safetensors.numpy.save_file(released(tensors) | {"pos_embed": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match="not the fixed table"):
        huggingface.load(str(path), "transformer")


def test_size():
    """DiT-XL/2 as published: 675.13 M, of which the fixed position table is 0.29 M."""
    module = dit.DiT()
    shapes = huggingface.shapes("transformer", module)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == 674_834_720
    assert count + dit.position_table(16, 16, module.width).size == 675_129_632


def test_waves_of_the_time_by_hand():
    """Frequencies 1, 1 / 100, and (shift 1) 1 / 10000 at the end of three, or not yet (shift 0)."""
    time_B = jnp.array([2.0])
    angles = 2 / 10000 ** np.array([0, 1 / 2, 1])
    np.testing.assert_allclose(
        dit.time_waves(time_B, 3, 1)[0], [*np.cos(angles), *np.sin(angles)], rtol=1e-6
    )
    angles = 2 / 10000 ** np.array([0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(
        dit.time_waves(time_B, 3, 0)[0], [*np.cos(angles), *np.sin(angles)], rtol=1e-6
    )


def test_a_fresh_one_predicts_zero_and_learns_everything_at_once():
    """Zero at first: blocks are identities. Then a gradient reaches each of its parameters."""
    module = dit.DiT(**SMALL, learned_variance=False, time_scale=1000.0)
    noisy = jnp.asarray(generator("noisy").standard_normal((2, 8, 12, 1)), jnp.float32)
    arguments = noisy, jnp.array([0.25, 1.0]), jnp.array([0, 3])
    params = jax.jit(module.init)(jax.random.key(0), *arguments)["params"]
    assert not jax.jit(module.predict)(params, *arguments).any()
    leaves, structure = jax.tree.flatten(params)
    drawn = [generator(str(i)).standard_normal(leaf.shape) * 0.3 for i, leaf in enumerate(leaves)]
    params = jax.tree.unflatten(structure, [jnp.asarray(d, jnp.float32) for d in drawn])
    gradient = jax.jit(jax.grad(lambda p: (module.predict(p, *arguments) ** 2).sum()))(params)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_the_class_and_no_class_are_conditions():
    module = dit.DiT(**SMALL)
    np.testing.assert_array_equal(module.of_labels({}, jnp.array([2, 0])), [2, 0])
    np.testing.assert_array_equal(module.null({}, 2), [3, 3])


def test_a_continuous_time_is_the_scaled_one():
    module = dit.DiT(**SMALL, time_scale=1000.0)
    noisy, labels = jnp.ones((1, 4, 4, 1)), jnp.array([1])
    shapes = huggingface.shapes("transformer", module)
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.1), shapes)
    scaled, plain = (jax.jit(m.predict) for m in (module, module.clone(time_scale=1.0)))
    found = scaled(params, noisy, jnp.array([0.25]), labels)
    np.testing.assert_array_equal(found, plain(params, noisy, jnp.array([250.0]), labels))
    assert not np.array_equal(found, scaled(params, noisy, jnp.array([0.5]), labels))


def test_a_latent_that_patches_do_not_divide_is_refused():
    module = dit.DiT(**SMALL)
    arguments = jnp.zeros((1, 8, 6, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    with pytest.raises(UserError, match="8 x 6 do not divide into patches of 4"):
        module.init(jax.random.key(0), *arguments)
