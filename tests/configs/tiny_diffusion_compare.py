"""Two rows of one tiny generator, and two that are their images and those of a control."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

D4M, TINY = "tests/configs/tiny_d4m.py", "tests/configs/tiny_ipc.py"


def get_config(arg: str = "") -> ConfigDict:
    del arg
    c = ConfigDict()
    c.name = "tiny_diffusion_compare"
    c.argument = ""
    c.ipcs, c.seeds, c.student_seeds = (2,), (0,), 1
    as_they_are = (TINY, "recover.iterations=0", "recover.pool=()")
    rows = {
        "d4m": (D4M,),
        "guided": (D4M, "generate.mode_weight=0.5"),
        "from_d4m": as_they_are,
        "from_medoids": as_they_are,
    }
    c.rows = ConfigDict(rows, sort_keys=False)
    c.starts = ConfigDict({"from_d4m": "d4m", "from_medoids": "d4m/medoids"})
    c.starts.d4m = placeholder(str)
    c.controls = "random_real"  # no row of that name
    c.more_controls = ConfigDict({"d4m": ("medoids",), "guided": ()})
    c.reference, c.selected_real, c.resamples = "d4m", ("medoids",), 200
    c.shared = ("relabel.epochs=2", "validate.epochs=2", "recover.slots_per_batch=1")
    c.protocols = ConfigDict({"single": ()})
    return c
