"""Every network of the second engine against diffusers and transformers, from their directories.

The golden files hold what those computed; where they are installed, they are checked too.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from diffusion import our_networks, parity

from prism_jax.diffusion import autoencoder, blocks, clip, dit, huggingface, unet
from prism_jax.models import layers


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_networks_match_the_published_ones(case, tmp_path):
    golden = parity.write(case, tmp_path / case.name)
    assert parity.compare(our_networks.outputs(case, tmp_path / case.name), golden) == []


# --- the twins: one operation is another, and the comparison sees it --------------------------

NORMALISE = layers.normalise
CONV = layers.conv2d
INTERLEAVED = blocks.interleaved


def other_epsilon(x, axes, epsilon):
    return NORMALISE(x, axes, 10 * epsilon)


def tanh_gelu(x):
    return jax.nn.gelu(x, approximate=True)


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def centred(x_BHWC, *args, stride=1, **kwargs):
    """Pixels are dropped in front where they should be behind."""
    return CONV(x_BHWC[:, ::-1, ::-1] if stride == 2 else x_BHWC, *args, stride=stride, **kwargs)


def transposed(corners):
    """Rows of corners are taken for columns."""
    return INTERLEAVED(list(zip(*corners, strict=True)))


def attend_without_scale(query, key, value, *, causal=False):
    return jax.nn.dot_product_attention(query, key, value, scale=1.0, is_causal=causal)


def attend_to_all(query, key, value, *, causal=False):
    return jax.nn.dot_product_attention(query, key, value)


# (case, what is replaced, by what); of the U-Net, the first is fast enough.
TWINS = [
    ("dit", (dit, "gelu"), exact_gelu),
    ("dit", (layers, "normalise"), other_epsilon),
    ("dit", (our_networks, "FORMS"), {"dit": {"frequency_shift": 0}}),
    ("dit", (our_networks, "FORMS"), {"dit": {"mlp_epsilon": 1e-6}}),
    ("dit_released", (our_networks, "FORMS"), {}),
    ("unet_1", (unet, "gelu"), tanh_gelu),
    ("unet_1", (unet, "SPATIAL_EPSILON"), 1e-5),
    ("unet_1", (unet, "TOKEN_EPSILON"), 1e-6),
    ("unet_1", (blocks, "interleaved"), transposed),
    ("unet_1", (blocks, "attend"), attend_without_scale),
    ("unet_2", (our_networks, "FORMS"), {"unet_2": {"heads": (2, 2, 2)}}),
    ("unet_2", (our_networks, "FORMS"), {"unet_2": {"epsilon": 1e-6}}),
    ("vae_decode", (autoencoder, "EPSILON"), 1e-5),
    ("vae_decode", (blocks, "interleaved"), transposed),
    ("vae_decode", (our_networks, "FORMS"), {"vae_decode": {"scale": 0.18}}),
    ("vae_encode", (autoencoder, "EPSILON"), 1e-5),
    ("vae_encode", (layers, "conv2d"), centred),
    ("clip_text", (blocks, "attend"), attend_to_all),
    ("clip_text", (clip, "ACTIVATIONS"), {"quick_gelu": exact_gelu}),
    ("clip_text_projection", (clip, "ACTIVATIONS"), {"gelu": tanh_gelu}),
    ("clip_image", (layers, "normalise"), other_epsilon),
    ("clip_whole_image", (clip, "ACTIVATIONS"), {"quick_gelu": exact_gelu}),
]


SLOW_TWINS = [row for row in TWINS if row[0].startswith("unet")][1:]


@pytest.mark.parametrize(
    "name, where, twin",
    [pytest.param(*r, marks=pytest.mark.slow if r in SLOW_TWINS else ()) for r in TWINS],
)
def test_another_operation_is_seen(name, where, twin, tmp_path, monkeypatch):
    case = parity.BY_NAME[name]
    golden = parity.write(case, tmp_path / name)
    golden.pop("gradient", None)
    monkeypatch.setattr(*where, twin)
    found = our_networks.outputs(case, tmp_path / name, forward=True)
    assert set(parity.compare(found, golden)) == set(golden)


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_golden_files_are_what_the_published_code_says(case, tmp_path):
    reason = "needs torch, diffusers and transformers; the golden files stand for them"
    torch_networks = pytest.importorskip(
        "diffusion.torch_networks", reason=reason, exc_type=ImportError
    )
    golden = parity.write(case, tmp_path / "golden")
    found = torch_networks.outputs(case, tmp_path / "live")
    assert parity.compare(found, golden) == []
    ours, theirs = (
        huggingface.load(str(tmp_path / name), case.part) for name in ("golden", "live")
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, theirs.params))
    assert ours.module == theirs.module
