"""All methods and the bar of selected real images on CIFAR-10, with strong teachers.

    python -m prism_jax.main --config=configs/cifar10_teachers.py --stages=squeeze
    python -m prism_jax.compare --config=configs/compare/cifar10.py

The first command trains three of the five teachers; the published resnet44 (primary) and resnet20
are read from data/teachers (configs/cifar10_ipc10.py says which files). A tenth of the training
images is held out: who is best is said by them. The published teachers have seen them.

Arguments after the colon:
  ipc1, ipc10, ipc50   images per class, all under one protocol, `single` (default: ipc10)
  own                  IPC 10, every method's own labels and training
  crop, batch          PRISM's tables 3 and 4 as far as ten classes allow, IPC 10. A batch's slots
                       share a draw of teachers, so its size and the number of draws are mixed:
                       batch_* as the draw falls, fixed_* with one other network's statistics

One protocol: the labels of resnet44 (crops from 0.25, CutMix, 300 epochs), one training. Methods
take this pool in place of their own, and their recipes for CIFAR; CDA and FADRM, which have none,
take SRe2L's and PSM's with their own parts. No set is optimised for more than ITERATIONS.

The rows prism_* ask what makes PRISM: whose statistics (its own, one other's, a committee's, a draw
in every iteration), and which images share a batch (one slot of every class; a whole class; all).
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs import cifar10_ipc10, cifar10_teachers
from configs.compare import digits
from configs.compare.digits import method

ITERATIONS = 1000
POOL = (*cifar10_ipc10.CHECKPOINTS, *cifar10_teachers.NETWORKS)  # the primary first
OTHER = "mobilenet_v2"  # whose statistics stand for another network's
STUDENTS = ("resnet20", "convnet_d3")
KINDS = ("ipc1", "ipc10", "ipc50", "own", "crop", "batch")

ALL = f"recover.pool={','.join(POOL)}"
ALONE = f"recover.pool={POOL[0]}"
STEPS = f"recover.iterations={ITERATIONS}"
MEAN = (f"relabel.teachers={','.join(POOL)}", "relabel.ensemble=mean")  # own labels
PRISM = method("prism", ALL, STEPS)
FIXED = "recover.statistics_by=fixed"
ONE_OTHER = (FIXED, f"recover.statistic_primary={OTHER}")
CLASSES, ALL_AT_ONCE = "recover.batch_order=class_major", "recover.batch_size=None"
PATCHES = ("recover.initialise=mosaic", "recover.patch_factor=1", "recover.patch_choice=median")
RANDOM = method("prism", "recover.initialise=real_random", "recover.iterations=0",
                "recover.pool=()")  # fmt: skip
SELECTED = ("real_herding", "real_feature_medoids", "real_confident", "real_balanced")

SINGLE = (
    *digits.LABELS, *digits.STUDENT, "relabel.mix_alpha=1.0", "relabel.crop_pad=None",
    f"relabel.teachers={POOL[0]}", "relabel.ensemble=single", "relabel.teacher_mode=eval",
    "relabel.bn_group=None", "relabel.epochs=300", "relabel.batch_size=50",
    "validate.epochs=300", "validate.batch_size=50", "validate.accumulate=1",
    "validate.warmup_epochs=0", "validate.decay=kernels", "validate.milestones=None",
    "validate.gamma=None",
)  # fmt: skip


def get_config(arg: str = "ipc10") -> ConfigDict:
    if arg not in KINDS:
        raise ValueError(f"argument {arg!r}; allowed: {', '.join(KINDS)}")
    c = ConfigDict()
    c.name, c.argument = f"compare_cifar10_{arg}", "cifar10"
    c.ipcs = (int(arg[3:]) if arg.startswith("ipc") else 10,)
    c.seeds, c.student_seeds = (0, 1, 2), 1
    c.dataset = ConfigDict({"source": "cifar", "path": "data/cifar-10-batches-py", "held_out": 0.1})
    rows = {"crop": _crop, "batch": _batch, "ipc50": _leading}.get(arg, _all)()
    if arg != "own":
        rows["random_real"] = RANDOM
    c.rows = ConfigDict(rows, sort_keys=False)
    c.controls = "random_real"
    c.control_sets = ("random_real_hard", "full_real", *SELECTED)
    if arg == "ipc50":
        c.control_sets = ("random_real_hard", *SELECTED)
    elif arg in ("crop", "batch"):
        c.control_sets = ()
    c.reference, c.selected_real, c.resamples = next(iter(rows)), SELECTED, 10_000

    trained = (
        f"networks.{name}.checkpoint=runs/cifar10_teachers/squeeze/{name}"
        for name in cifar10_teachers.NETWORKS
    )
    width = cifar10_teachers.NETWORKS[OTHER]["width"]
    c.shared = (
        f"validate.students={','.join(STUDENTS)}", f"squeeze.teachers={','.join(POOL)}",
        *trained, f"networks.{OTHER}.width={width}", f"recover.primary={POOL[0]}",
        "recover.scorer=None", "recover.priors=None", "relabel.priors=None",
        f"relabel.teachers={POOL[0]}",
        # All are imported; these say only that all rows have the same.
        "squeeze.optimiser=sgd", "squeeze.schedule=cosine", "squeeze.learning_rate=0.1",
        "squeeze.weight_decay=0.0005", "squeeze.batch_size=128", "squeeze.epochs=10",
    )  # fmt: skip
    if arg == "own":
        c.protocols = ConfigDict({"own": ("validate.controls=random_real,real_balanced",)})
        c.reference, c.selected_real = "prism", ()
    elif arg == "crop":
        crops = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
        protocols = {f"crop_{at:.0%}"[:-1]: (*SINGLE, f"relabel.crop_min={at}") for at in crops}
        c.protocols = ConfigDict(protocols, sort_keys=False)
    else:
        c.protocols = ConfigDict({"single": SINGLE})
    return c


def _all() -> dict[str, tuple[str, ...]]:
    rows = {
        "prism": PRISM,
        "prism_self": (*PRISM, FIXED),
        "prism_other": (*PRISM, *ONE_OTHER),
        "prism_committee": (*PRISM, "recover.statistics_by=committee"),
        "prism_every_iteration": (*PRISM, "recover.granularity=per_iteration"),
        "prism_class": (*PRISM, CLASSES, "recover.batch_size=10"),
        "prism_all_at_once": (*PRISM, CLASSES),
    }
    return rows | {
        "sre2l": method("sre2l", ALONE, STEPS),
        "rded": method("rded"),
        "cda": method("sre2l", ALONE, STEPS, "recover.crop_curriculum=cosine"),
        "dwa": method("dwa", ALONE, STEPS),
        "delt": method("delt", ALONE, STEPS),
        "cvdd": method("cvdd", ALL, STEPS, "recover.committee=listed", *MEAN),
        "fadrm": method("psm", ALL, STEPS, "recover.targets=running", *PATCHES, *MEAN),
        "psm": method("psm", ALL, STEPS, *MEAN),
        "gvbsm": method("gvbsm", ALL, STEPS, *MEAN),
        "edc": method("edc", ALL, STEPS, *MEAN),
        "prism_plus": method("prism_plus", ALL),
    }


def _leading() -> dict[str, tuple[str, ...]]:
    rows = _all()
    return {name: rows[name] for name in ("prism", "edc", "prism_plus")}


def _crop() -> dict[str, tuple[str, ...]]:
    return {"prism": PRISM}


def _batch() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    draws: Mapping[str, tuple[str, ...]] = {"batch": (), "fixed": ONE_OTHER}
    for name, draw in draws.items():
        for slots in (1, 2, 5, 10):
            sizes = (f"recover.batch_size={10 * slots}", f"recover.slots_per_batch={slots}")
            found[f"{name}_{10 * slots}"] = (*PRISM, *draw, *sizes)
    return found
