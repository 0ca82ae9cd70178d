"""Full-size networks, by their shapes: as many parameters as the published ones have."""

from __future__ import annotations

import jax
import pytest

from prism_jax.diffusion import huggingface
from prism_jax.diffusion.autoencoder import AutoencoderKL
from prism_jax.diffusion.clip import ImageEncoder, TextEncoder
from prism_jax.diffusion.unet import UNet2DCondition

OPEN_CLIP_H = {"width": 1024, "heads": 16, "hidden": 4096, "activation": "gelu", "depth": 23}
SIZES = {
    "Stable Diffusion 1.5": ("unet", UNet2DCondition(), 859.52),
    "Stable Diffusion 2.1": (
        "unet", UNet2DCondition(context=1024, linear=True, heads=(5, 10, 20, 20)), 865.91,
    ),
    "autoencoder": ("vae", AutoencoderKL(), 83.65),
    "CLIP-L, text": ("text_encoder", TextEncoder(), 123.06),
    "OpenCLIP-H, text": ("text_encoder", TextEncoder(**OPEN_CLIP_H), 340.39),
    "CLIP ViT-B/32, images": ("image_encoder", ImageEncoder(), 87.85),
    "CLIP ViT-L/14, images": (
        "image_encoder",
        ImageEncoder(patch=14, width=1024, depth=24, heads=16, hidden=4096, projection=768),
        303.97,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    part, module, millions = SIZES[name]
    leaves = jax.tree.leaves(huggingface.shapes(part, module))
    assert round(sum(leaf.size for leaf in leaves) / 1e6, 2) == millions
