"""The studies of PRISM's supplement, each a sweep on ImageNet-1K.

    python -m prism_jax.compare --config=configs/compare/studies.py:crop
    python -m prism_jax.compare --config=configs/compare/studies.py:batch
    python -m prism_jax.compare --config=configs/compare/studies.py:selection
    python -m prism_jax.compare --config=configs/compare/studies.py:regularisation
    python -m prism_jax.compare --config=configs/compare/studies.py:text_to_image

At IPC 10:

  crop       smallest crop of the labelled views. Table 3: 45.0, 45.1, 45.3, 45.7, 45.4, 45.1 %
             for .1, .15, .2, .25, .3, .4
  batch      images optimised together. Table 4: 44.8, 45.2, 45.7 % for 40, 80, 100. 80 does not
             divide 1,000 classes: here it is 40 classes at two slots
  selection  whom to draw, and when (appendix C, see configs/methods/prism_selection.py): one
             teacher, one other for the statistics, always k of the others, or the drawn subset,
             once per IPC index (pre-distillation) or in every iteration (intra)

At IPC 1,200, students trained as in appendix C: hard labels, 90 epochs. Real images: 70.0 %.

  regularisation  SRe2L's images under other priors (appendix D, table 5)
             sre2l                                                               17.9 %
             clip           and the energy of a CLIP                              8.8 %
             pyramid        a sum over resolutions, with statistics                   -
             pyramid_alone  the same, without statistics of BatchNorm             7.6 %
             both           pyramid_alone with clip                               5.2 %
             early_late     sre2l with PRISM's varying iterations                     -
             The weight of CLIP is not stated; here it is 1, of ViT-B/32
  text_to_image   images from their classes' names alone (appendix E, table 6)
             sd1            Stable Diffusion 1.5 (the paper: 1.0)                17.1 %
             sd2            Stable Diffusion 2.1                                 14.5 %
             flux_schnell, sdxl, sd35_turbo, sdxl_turbo          9.8, 9.7, 6.4, 4.7 %
             The last four are folders that others' pipelines write (docs/diffusion.md). Prompts
             and guidance are not stated; here they are "a photo of a {}" and 7.5

A second word runs one on another data set: `crop,digits`, `selection,digits`. On the digits the
last two have IPC 10 and the digits' epochs; rows with a CLIP are there where a third word says so
(`regularisation,digits,clip`), and what stands for text-to-image is the small generator that
squeeze trains, without anchors.
"""

from ml_collections import ConfigDict

from configs import base
from configs.methods import recipes
from configs.methods.prism_selection import POOL

PRISM, SELECTION = "configs/methods/prism.py", "configs/methods/prism_selection.py"
CROPS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
BATCHES = {40: 1, 80: 2, 100: 1}  # with how many slots
SRE2L, D4M = "configs/methods/sre2l.py", "configs/methods/d4m.py"
# Appendix C's training, see configs/methods/prism_selection.py.
HARD = (
    "relabel.crop_min=0.25", "relabel.mix=none", "validate.loss=ce", "validate.ce_weight=0.1",
    "validate.accumulate=1", "validate.optimiser=sgd", "validate.learning_rate=0.1",
    "validate.weight_decay=0.0001", "validate.schedule=linear",
)  # fmt: skip
HARD_IMAGENET = (
    "relabel.epochs=90", "validate.epochs=90", "relabel.batch_size=256", "validate.batch_size=256",
    "recover.short_classes=repeat",  # some classes have fewer than 1,200 images, as a control
)  # fmt: skip
NAMES = "generate.class_names=data/imagenet_names.txt"
CLIP = ("recover.clip=1.0", "recover.clip_directory=data/clip-vit-base-patch32")
PYRAMID = "recover.parametrisation=pyramid"
NO_STATISTICS = "recover.alpha_bn=0.0"
TEXT_ALONE = ("generate.anchors=none", "generate.strength=1.0")
FOLDERS = ("flux_schnell", "sdxl", "sd35_turbo", "sdxl_turbo")


def get_config(arg: str = "crop") -> ConfigDict:
    study, _, rest = arg.partition(",")
    dataset, _, word = rest.partition(",")
    dataset = dataset or "imagenet"
    clip = (study, dataset, word) == ("regularisation", "digits", "clip")
    if study not in ROWS or dataset not in recipes.DATASETS or (word and not clip):
        raise ValueError(
            f"argument {arg!r}; allowed: {', '.join(ROWS)}, after a comma a data set, and after "
            f"regularisation,digits the word clip"
        )
    if study in WITH_HARD_LABELS:
        return _with_hard_labels(study, dataset, clip)
    c = ConfigDict()
    c.name = f"study_{study}_{dataset}"
    c.argument = dataset
    c.ipcs = (10,)
    c.seeds = (0,)
    c.student_seeds = 1
    c.rows = ConfigDict(ROWS[study](dataset), sort_keys=False)
    c.controls = "random_real"  # no row of that name: every cell has its own
    c.resamples = 10_000
    c.shared = ()
    control = "random_real_hard" if study == "selection" else "random_real"
    c.protocols = ConfigDict({"own": (f"validate.controls={control}",)}, sort_keys=False)
    return c


def _with_hard_labels(study: str, dataset: str, clip: bool) -> ConfigDict:
    """Tables 5 and 6: other images, appendix C's training."""
    if dataset not in ("imagenet", "digits"):
        raise ValueError(f"{study} is of imagenet, and has a form on digits; not of {dataset}")
    digits = dataset == "digits"
    c = ConfigDict()
    c.name = "_".join(["study", study, dataset, *["clip"] * clip])
    c.argument = dataset
    c.ipcs = (10,) if digits else (1200,)
    c.seeds = (0,)
    c.student_seeds = 1
    rows = ROWS[study](dataset)
    rows = {name: row for name, row in rows.items() if clip or not digits or CLIP[0] not in row}
    c.rows = ConfigDict(rows, sort_keys=False)
    c.controls = "random_real"
    c.shared = HARD if digits else (*HARD, *HARD_IMAGENET)
    controls = "validate.controls=random_real_hard,full_real"
    c.protocols = ConfigDict({"own": (controls,)}, sort_keys=False)
    return c


def _crop(dataset: str) -> dict[str, tuple[str, ...]]:
    return {f"crop_{round(100 * at)}": (PRISM, f"relabel.crop_min={at}") for at in CROPS}


def _batch(dataset: str) -> dict[str, tuple[str, ...]]:
    return {
        f"batch_{size}": (PRISM, f"recover.batch_size={size}", f"recover.slots_per_batch={slots}")
        for size, slots in BATCHES.items()
    }


def _selection(dataset: str) -> dict[str, tuple[str, ...]]:
    others = base.POOL if dataset == "digits" else POOL
    rows: dict[str, tuple[str, ...]] = {"single": (SELECTION, "recover.statistics_by=fixed")}
    for name in others[1:]:
        other = f"recover.statistic_primary={name}"
        rows[f"dual_{name}"] = (*rows["single"], other)
    for k in range(1, len(others)):
        always = "recover.subset_probability=1.0"
        rows[f"with_{k}_others"] = (SELECTION, always, f"recover.subset_others={k}")
    rows["pre"] = (SELECTION,)
    rows["intra"] = (SELECTION, "recover.granularity=per_iteration")
    return rows


def _regularisation(dataset: str) -> dict[str, tuple[str, ...]]:
    names = () if dataset == "digits" else (NAMES,)
    return {
        "sre2l": (SRE2L,),
        "clip": (SRE2L, *CLIP, *names),
        "pyramid": (SRE2L, PYRAMID),
        "pyramid_alone": (SRE2L, PYRAMID, NO_STATISTICS),
        "both": (SRE2L, PYRAMID, NO_STATISTICS, *CLIP, *names),
        "early_late": (SRE2L, "recover.budget=mod8"),
    }


def _text_to_image(dataset: str) -> dict[str, tuple[str, ...]]:
    if dataset == "digits":
        return {"small": (D4M, *TEXT_ALONE)}
    prompted = (D4M, *TEXT_ALONE, "generate.guidance=7.5", "generate.negative=")
    ours = {
        "sd1": prompted,
        "sd2": (
            *prompted, "generate.image_size=768", "generate.directory=data/stable-diffusion-2-1",
        ),
    }  # fmt: skip
    read = (SRE2L, "recover.initialise=folder", "recover.iterations=0", "recover.pool=()")
    return ours | {name: (*read, f"recover.initialise_from=data/sets/{name}") for name in FOLDERS}


ROWS = {
    "crop": _crop,
    "batch": _batch,
    "selection": _selection,
    "regularisation": _regularisation,
    "text_to_image": _text_to_image,
}
WITH_HARD_LABELS = ("regularisation", "text_to_image")
