"""All methods but denoisers on the embedded digits: two IPCs, three seeds, three protocols.

    python -m prism_jax.compare --config=configs/compare/digits.py

Many hours on two cores; it can be stopped and continues. `digits.py:quick` has a fifth of the
iterations, one row for the statistics of another network, and two protocols.

Protocols: `own` is each method's (adapted to the digits, see configs/methods); `single` gives all
images the labels of one teacher and one training, in the manner of RD3; `committee` those of four
teachers in the student's own BatchNorm groups (the labels of CV-DD and FADRM, which may matter more
than any images). Random real images, with the same labels and with hard ones, the full real data,
and real images chosen in the features of resnet18 go through the same protocols; under `own` every
method has random real images of its own, and the others are left out.

The rows prism_* ask what decoupling contributes. All start from the same real images and take
the logits of resnet18; the statistics are those of resnet18 itself, of one other network, of the
drawn subset (`prism`), or of a committee of two. `fadrm_retrieved` is FADRM+ with RETA's retrieval.
"""

from ml_collections import ConfigDict

# The last two match statistics that take a while to measure.
METHODS = ("rded", "sre2l", "cda", "dwa", "delt", "cvdd", "fadrm", "gvbsm", "edc")
OTHERS = ("mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")
TEACHERS = f"resnet18,{','.join(OTHERS)}"
# What every protocol but `own` says of labels and of students.
LABELS = (
    "relabel.mode=store", "relabel.crop_min=0.25", "relabel.mix=cutmix", "relabel.patch_shuffle=1",
)  # fmt: skip
STUDENT = (
    "validate.loss=kl", "validate.temperature=20.0", "validate.ce_weight=0.0",
    "validate.optimiser=adamw", "validate.learning_rate=0.001", "validate.weight_decay=0.01",
    "validate.schedule=cosine", "validate.zeta=1.0", "validate.ema=None",
)  # fmt: skip


def method(name: str, *overrides: str) -> tuple[str, ...]:
    return (f"configs/methods/{name}.py", *overrides)


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "quick"):
        raise ValueError(f"unknown argument {arg!r}; allowed: quick")
    c = ConfigDict()
    c.name = "_".join(filter(None, ("compare_digits", arg)))
    # Of every method's config, beside the IPC.
    c.argument = ",".join(filter(None, ("digits", arg)))
    c.ipcs = (1, 10)
    c.seeds = (0, 1, 2)  # of images and labels
    c.student_seeds = 1  # students of every kind that train on each

    c.rows = ConfigDict({"prism": method("prism")}, sort_keys=False)  # in the tables' order
    c.rows.prism_self = method("prism", "recover.statistics_by=fixed")
    for other in OTHERS[:1] if arg else OTHERS:
        c.rows[f"prism_{other}"] = method(
            "prism", "recover.statistics_by=fixed", f"recover.statistic_primary={other}"
        )
    c.rows.prism_committee = method("prism", "recover.statistics_by=committee")
    for name in METHODS:
        c.rows[name] = method(name)
    c.rows.fadrm_retrieved = method("fadrm", "recover.inject_from=retrieved")
    c.rows.psm = method("psm")
    c.rows.prism_plus = method("prism_plus")
    c.rows.random_real = method(
        "prism", "recover.initialise=real_random", "recover.iterations=0", "recover.pool=()"
    )
    c.controls = "random_real"  # the row that goes first, and trains on these sets too
    c.control_sets = (
        "random_real_hard", "full_real",
        "real_herding", "real_feature_medoids", "real_confident", "real_balanced",
    )  # fmt: skip

    # What all are measured by; and how often intervals are drawn.
    c.reference, c.selected_real, c.resamples = "prism", (), 10_000

    # Overrides of every cell, and of the cells of a protocol.
    c.shared = ("validate.students=resnet18,convnet", f"squeeze.teachers={TEACHERS},convnet")
    c.protocols = ConfigDict(sort_keys=False)
    c.protocols.single = (
        *LABELS, *STUDENT, "relabel.teachers=resnet18", "relabel.ensemble=single",
        "relabel.teacher_mode=eval", "relabel.bn_group=None",
        "relabel.batch_size=50", "validate.batch_size=50", "validate.accumulate=1",
    )  # fmt: skip
    controls = "random_real" if arg else "random_real,random_real_hard"
    c.protocols.own = (f"validate.controls={controls}",)
    if not arg:
        c.protocols.committee = (
            *LABELS, *STUDENT, f"relabel.teachers={TEACHERS}", "relabel.ensemble=mean",
            "relabel.teacher_mode=train", "relabel.bn_group=5",
            "relabel.batch_size=10", "validate.batch_size=10", "validate.accumulate=2",
        )  # fmt: skip
    return c
