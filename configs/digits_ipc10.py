"""PRISM on scikit-learn's digits, 10 images per class.

python -m prism_jax.main --config=configs/digits_ipc10.py
"""

from ml_collections import ConfigDict

from configs import digits


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    return digits.config(ipc=10)
