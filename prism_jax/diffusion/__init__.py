"""The second engine: images from a denoiser. Pure functions of (params, arrays)."""
