"""PRISM, SRe2L and random real images on images of your own: IPC 1 and 10, three seeds.

    python -m prism_jax.compare --config=configs/compare/own_folder.py \\
        --config.dataset.path=DIR --config.dataset.name=my_birds

DIR and the argument (`cpu`: narrow networks and few iterations) are as for configs/own_folder.py,
which is every row's. All rows have the labels of one teacher and the same students. Another method
is another row, as in digits.py beside this file; fewer cells are --config.ipcs="(10,)" and
--config.seeds="(0,)".
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

OWN = "configs/own_folder.py"


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "cpu"):
        raise ValueError(f"unknown argument {arg!r}; allowed: cpu")
    c = ConfigDict()
    c.name = "_".join(filter(None, ("compare_own", arg)))
    c.argument = arg
    c.ipcs = (1, 10)
    c.seeds = (0, 1, 2)  # of images and labels
    c.student_seeds = 1
    c.dataset = ConfigDict({"name": "own", "source": "folder"}, sort_keys=False)
    c.dataset.path = placeholder(str)

    c.rows = ConfigDict({"prism": (OWN,)}, sort_keys=False)  # in the tables' order
    c.rows.sre2l = (OWN, "recover.method=sre2l", "recover.pool=resnet18")
    c.rows.random_real = (
        OWN, "recover.initialise=real_random", "recover.iterations=0", "recover.pool=()",
    )  # fmt: skip
    c.controls = "random_real"
    c.control_sets = ("random_real_hard", "full_real")
    c.shared = ()  # overrides of every cell
    c.protocols = ConfigDict({"single": ()}, sort_keys=False)
    return c
