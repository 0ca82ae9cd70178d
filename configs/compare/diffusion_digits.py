"""Images from a denoiser beside optimised ones, on the embedded digits: IPC 1 and 10, three seeds.

    python -m prism_jax.compare --config=configs/compare/diffusion_digits.py

An hour and a half on two cores; it can be stopped and continues. One protocol, `single` of
`digits.py`: one teacher labels, one training. One small generator, trained once, makes the images
of all rows.

  d4m, mgd3, ddoq, cao2   the second engine's methods, on one small transformer
  d4m's controls          its anchors, decoded; the real images nearest to them (medoids: real
                          images that are selected); the same generator without anchors
  prism, sre2l            from real images
  prism_d4m               from D4M's images
  prism_medoids           from D4M's medoids: selected real images

Every set trains four kinds of students: a residual and a mobile network, a plain convnet with
instance norm, and a transformer. The teacher that labels is residual. A tenth of the training
images is held out: who is best is said by them.
"""

from ml_collections import ConfigDict

from configs.compare import digits

GENERATED = ("d4m", "mgd3", "ddoq", "cao2")
STUDENTS = ("resnet18", "shufflenet_v2_x0_5", "convnet", "vit")


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    full = digits.get_config()
    c = ConfigDict()
    c.name = "compare_diffusion_digits"
    c.argument = full.argument
    c.ipcs, c.seeds, c.student_seeds = full.ipcs, full.seeds, full.student_seeds

    c.dataset = ConfigDict({"held_out": 0.1})
    rows = {name: digits.method(name) for name in GENERATED}
    rows |= dict.fromkeys(("prism", "prism_d4m", "prism_medoids"), digits.method("prism"))
    rows["sre2l"] = digits.method("sre2l")
    c.rows = ConfigDict(rows | {"random_real": full.rows.random_real}, sort_keys=False)
    c.starts = ConfigDict({"prism_d4m": "d4m", "prism_medoids": "d4m/medoids"})
    c.controls, c.control_sets = full.controls, full.control_sets
    c.reference, c.selected_real, c.resamples = "prism", ("medoids",), full.resamples
    c.more_controls = ConfigDict({"d4m": ("decoded_anchors", "medoids", "no_anchors")})

    teachers = full.shared[1]
    c.shared = (f"validate.students={','.join(STUDENTS)}", teachers)
    c.protocols = ConfigDict({"single": full.protocols.single})
    return c
