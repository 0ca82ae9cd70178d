"""Six shadow runs of three rows on the tiny experiment."""

from ml_collections import ConfigDict

TINY, TINY_D4M = "tests/configs/tiny_ipc.py", "tests/configs/tiny_d4m.py"


def get_config(arg: str = "") -> ConfigDict:
    del arg
    c = ConfigDict()
    c.name = "tiny_audit"
    c.argument = ""
    c.ipc = 2
    c.dataset = ConfigDict()
    c.seed = 0
    c.shadows = 6
    c.canaries = 8
    c.always = 2
    c.rows = ConfigDict(sort_keys=False)
    c.rows.without = (TINY,)
    c.rows.medoids = (TINY_D4M, "generate.anchors=medoid", "generate.strength=0.0")
    c.rows.prism = (TINY,)
    c.without = ("without",)
    c.shared = (
        "squeeze.batch_size=12", "squeeze.least_top1=0.0", "squeeze.teachers=first,second,outside",
        "relabel.mode=online", "validate.controls=()", "relabel.epochs=2", "validate.epochs=2",
    )  # fmt: skip
    c.gradients = ConfigDict()
    c.gradients.row = "prism"
    c.gradients.images = 2
    c.gradients.iterations = (0, 5)
    c.gradients.alphas = (0.01, 1.0)
    c.gradients.draws = 64
    return c
