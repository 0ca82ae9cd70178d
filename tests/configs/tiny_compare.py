"""Two methods and the controls on the tiny experiment, under their own protocol and another."""

from ml_collections import ConfigDict

TINY = "tests/configs/tiny_ipc.py"


def get_config(arg: str = "") -> ConfigDict:
    del arg
    c = ConfigDict()
    c.name = "tiny_compare"
    c.argument = ""
    c.ipcs = (1, 2)
    c.seeds = (0, 1)
    c.student_seeds = 2
    c.rows = ConfigDict(sort_keys=False)
    c.rows.prism = (TINY,)
    c.rows.gvbsm = (
        TINY, "recover.method=gvbsm", "recover.match=bn,conv", "recover.iterations=3",
        "relabel.teachers=second",
    )  # fmt: skip
    c.rows.random_real = (
        TINY, "recover.iterations=0", "recover.initialise=real_random", "recover.pool=()",
    )  # fmt: skip
    c.controls = "random_real"
    c.control_sets = ("random_real_hard", "full_real")
    c.shared = ("squeeze.epochs=1", "recover.iterations=6")
    c.protocols = ConfigDict({"own": ("validate.controls=random_real",)}, sort_keys=False)
    c.protocols.short = ("relabel.teachers=first", "relabel.epochs=2", "validate.epochs=2")
    return c
