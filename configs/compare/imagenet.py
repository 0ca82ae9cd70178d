"""All methods and the bar of real images on ImageNet-1K: IPC 10, one protocol, three students each.

    python -m prism_jax.compare --config=configs/compare/imagenet.py
    python -m prism_jax.compare --config=configs/compare/imagenet.py --plan --target=h100

The rows of `digits.py` and `diffusion_digits.py` under their protocol `single`: each method's own
images, the labels of one teacher (ResNet-18; crops from 0.25, CutMix, 300 epochs), one training.
Random real images go through it with soft and with hard labels; selected real ones are the images
nearest to D4M's anchors. The full training set is left out: its students take weeks.

Networks are torchvision's (data/teachers/*.pth), Stable Diffusion 1.5 and DiT-XL/2 are read from
data/stable-diffusion-v1-5 and data/DiT-XL-2-256 (docs/diffusion.md); a row whose files are not
there is taken out with --config.rows.NAME=None.

Of every class a hundredth, 13 training images, is held out: who is best is said by them. The
imported networks have seen them.
"""

from ml_collections import ConfigDict

from configs.compare import diffusion_digits, digits


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    return config("imagenet", "imagenet")


def config(name: str, argument: str) -> ConfigDict:
    """The comparison on ImageNet or a part of it."""
    c = ConfigDict()
    c.name, c.argument = f"compare_{name}", argument
    c.ipcs, c.seeds, c.student_seeds = (10,), (0,), 3
    c.dataset = ConfigDict({"path": "data/imagenet", "held_out": 0.01})

    rows = {"prism": digits.method("prism")}
    rows["prism_self"] = digits.method("prism", "recover.statistics_by=fixed")
    rows["prism_committee"] = digits.method("prism", "recover.statistics_by=committee")
    rows |= {method: digits.method(method) for method in digits.METHODS}
    rows |= {method: digits.method(method) for method in diffusion_digits.GENERATED}
    rows |= dict.fromkeys(("prism_d4m", "prism_medoids"), rows["prism"])
    rows["random_real"] = digits.get_config().rows.random_real
    c.rows = ConfigDict(rows, sort_keys=False)
    c.starts = ConfigDict({"prism_d4m": "d4m", "prism_medoids": "d4m/medoids"})
    c.controls, c.control_sets = "random_real", ("random_real_hard",)
    c.more_controls = ConfigDict({"d4m": ("medoids", "decoded_anchors", "no_anchors")})
    c.reference, c.selected_real, c.resamples = "prism", ("medoids",), 2000

    c.shared = ("validate.students=resnet18,mobilenet_v2",)
    c.protocols = ConfigDict()
    c.protocols.single = (
        *digits.LABELS, *digits.STUDENT, "relabel.teachers=resnet18", "relabel.ensemble=single",
        "relabel.priors=None", "relabel.teacher_mode=eval", "relabel.bn_group=None",
        "relabel.epochs=300", "relabel.batch_size=50", "validate.epochs=300",
        "validate.batch_size=50", "validate.accumulate=1", "validate.warmup_epochs=0",
        "validate.decay=kernels",
    )  # fmt: skip
    return c
