"""PRISM on scikit-learn's digits, 1 image per class.

python -m prism_jax.main --config=configs/digits_ipc1.py --from=runs/digits_ipc10
"""

from ml_collections import ConfigDict

from configs import digits


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    return digits.config(ipc=1)
