"""Image networks in flax.linen: one module per family, one registry."""

from prism_jax.models.registry import ARCHITECTURES, Architecture, build, first_layers, lookup

__all__ = ["ARCHITECTURES", "Architecture", "build", "first_layers", "lookup"]
