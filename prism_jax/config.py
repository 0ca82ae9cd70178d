"""The experiment as frozen dataclasses, one per stage, and the one way in from ConfigDict.

``ml_collections`` is the language of ``configs/``; past :func:`resolve` nothing knows it.
Field names here are the field names of the config and of ``--config.<section>.<field>=...``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from prism_jax.errors import UserError

STAGES = ("squeeze", "recover", "relabel", "validate", "analyse")
CONTROLS = ("random_real", "random_real_hard", "full_real")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Which real images; their constants stand in ``data.datasets``.

    ``damaged`` says what a damaged image does: stop the run, or be left out of the set.
    ``threads`` and ``workers`` (processes) read ahead; they change no batch. A set of images that
    takes more than ``cache_gigabytes`` decoded is read from disk whenever it is needed.
    ``mean`` and ``std`` replace the normalisation of the data set.
    """

    name: str
    source: str
    path: str | None
    image_size: int
    num_classes: int
    damaged: Literal["stop", "skip"]
    threads: int
    workers: int
    cache_gigabytes: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Network:
    """One named network: an architecture of the registry, scaled, and where its weights are.

    ``checkpoint`` is a file or folder of weights; without one the network is trained by squeeze.
    ``mean`` and ``std`` state the normalisation of imported weights (default: the dataset's).
    ``class_indices`` picks the dataset's classes from a larger head of ``head_classes``.
    """

    architecture: str
    width: float = 1.0
    depth: float = 1.0
    stem: Literal["imagenet", "small"] = "imagenet"
    checkpoint: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    head_classes: int | None = None
    class_indices: tuple[int, ...] | None = None

    def untrained(self) -> Network:
        """The network as a student: without what belongs to imported weights."""
        return Network(self.architecture, self.width, self.depth, self.stem)


# What networks compute in. Parameters, BatchNorm statistics, logits and images stay float32.
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Squeeze:
    """Getting teachers: trained here, or imported where a network names a checkpoint."""

    teachers: tuple[str, ...]
    epochs: int
    batch_size: int
    optimiser: str
    learning_rate: float
    weight_decay: float
    schedule: str
    crop_min: float
    crop_pad: int | None
    flip: bool
    seed: int
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class Recover:
    """Optimising pixels: one field or more per axis in which methods differ.

    What a field means stands beside its default in ``configs/base.py``; what may not be combined,
    in ``combinations``.
    """

    method: str
    ipc: int
    iterations: int
    budget: str
    rounds: int
    learning_rate: float
    schedule: str
    betas: tuple[float, float]
    # who supervises
    primary: str
    pool: tuple[str, ...]
    logits_by: str | None
    statistics_by: str | None
    statistic_primary: str | None
    granularity: Literal["per_slot", "per_batch", "per_iteration"]
    subset_others: int
    subset_probability: float
    committee: str
    priors: tuple[float, ...] | None
    prior_temperature: float
    round_robin_restarts: bool
    # which statistics, and what they count
    alpha_bn: float
    first_bn_multiplier: float
    first_layer: Literal["bn", "conv"]
    count_no_bn: bool
    match: tuple[str, ...]
    variance_weight: float
    statistic_patch: int
    class_share: float
    class_patch_swapped: bool
    ema: float
    ema_from_zero: bool
    drop: float
    alignment_scale: Literal["none", "layers", "targets"]
    # terms beside them
    total_variation: float
    image_l2: float
    densification: float
    flatness: float
    perturb_rho: float
    perturb_steps: int
    perturb_probes: bool
    perturb_accumulates: bool
    # batches
    batch_size: int | None
    slots_per_batch: int | None
    batch_order: Literal["ipc_major", "class_major"]
    # where images start, and what they go through
    initialise: str
    initialise_from: str | None
    scorer: str | None
    patch_factor: int
    patch_images: int
    patch_crops: int
    patch_choice: Literal["confident", "median"]
    phase_sizes: tuple[int, ...]
    inject: float
    crop_min: float
    crop_curriculum: str
    crop_milestone: float
    crop_pad: int | None
    flip: bool
    roll: int
    roll_centred: bool
    rounding: Literal["nearest", "truncate"]
    jpeg_quality: int | None
    steps_per_dispatch: int
    dtype: Dtype
    checkpoint_seconds: float


@dataclasses.dataclass(frozen=True)
class Relabel:
    """Soft labels over augmented views.

    ``mode`` changes no bit: "online" makes the labels while students train, and stores none.
    ``priors`` (percent, one per teacher) and ``prior_temperature`` are those of the ensemble
    "committee". ``teacher_mode`` "train" lets BatchNorm use the statistics of the batch, or of
    groups of ``bn_group`` images.
    """

    mode: Literal["store", "online"]
    teachers: tuple[str, ...]
    ensemble: str
    priors: tuple[float, ...] | None
    prior_temperature: float
    teacher_mode: Literal["eval", "train"]
    bn_group: int | None
    epochs: int
    batch_size: int
    crop_min: float
    flip: bool
    mix: Literal["none", "cutmix", "mixup"]
    mix_alpha: float
    mix_per: Literal["batch", "image"]
    crop_pad: int | None
    patch_shuffle: int
    precision: Literal["float32", "float16", "int8"]
    top_k: int | None
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class Validate:
    """Training students on the synthetic set and testing them on real images."""

    students: tuple[str, ...]
    seeds: tuple[int, ...]
    loss: str
    ce_weight: float
    temperature: float
    epochs: int
    batch_size: int
    accumulate: int
    bn_group: int | Literal["all"] | None
    optimiser: str
    learning_rate: float
    weight_decay: float
    decay: Literal["kernels", "all"]
    momentum: float
    nesterov: bool
    schedule: str
    zeta: float | None
    milestones: tuple[float, ...] | None
    gamma: float | None
    warmup_epochs: int
    warmup_start: float
    ema: float | None
    ema_statistics: bool
    dtype: Dtype
    eval_every: int
    controls: tuple[str, ...]
    checkpoint_seconds: float


@dataclasses.dataclass(frozen=True)
class Analyse:
    """Diversity, figures and the report."""

    network: str | None
    grid_classes: int
    grid_slots: int


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How work is shared by devices; changes no bit of recover and relabel, but for one field.

    ``recover_devices`` share one image batch, with the statistics of the whole of it: for batches
    that one device does not hold. More than one give other bits, and enter recover's fingerprint.
    A network is trained on ``train_devices`` of them, unset on as many as share its batches.
    ``matmul_precision`` says what a GPU or TPU makes of float32 in convolutions and products.
    """

    map: Literal["shard_map", "pmap"]
    recover_devices: int
    train_devices: int | None
    deterministic: bool
    matmul_precision: Literal["default", "high", "highest"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved experiment: what main runs."""

    name: str
    preset: str
    seed: int
    dataset: Dataset
    networks: dict[str, Network]
    squeeze: Squeeze
    recover: Recover
    relabel: Relabel
    validate: Validate
    analyse: Analyse
    parallel: Parallel

    def network(self, name: str) -> Network:
        """The definition of a named network; an unlisted name is the architecture itself."""
        return self.networks.get(name, Network(architecture=name))

    @property
    def soft_labels(self) -> bool:
        """Whether students learn from soft labels: cross entropy alone does not read them."""
        return self.validate.loss != "ce"

    @property
    def label_parts(self) -> int:
        """Parts of a batch that share no BatchNorm group when labels are made in groups."""
        return self.validate.accumulate if self.relabel.bn_group else 1


# Fields that change no bits, or that only say where the same bits come from: they enter no
# fingerprint.
NEUTRAL = {
    "recover": ("initialise_from", "steps_per_dispatch", "checkpoint_seconds"),
    "relabel": ("mode",),
    "validate": ("students", "seeds", "controls", "checkpoint_seconds"),
    "squeeze": ("teachers", "seed"),
}


# Raised when a change of code changes the bits that the same settings give, so that a workdir
# begun before it is not continued after it.
BITS_VERSION = 2


def fingerprint_fields(section: str, values: Any) -> dict[str, Any]:
    """What decides the bits of a section: its fields, as JSON values, and the code's version."""
    fields = json.loads(json.dumps(dataclasses.asdict(values)))
    kept = {k: v for k, v in fields.items() if k not in NEUTRAL.get(section, ())}
    return {**kept, "bits_version": BITS_VERSION}


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


# What a person calls the types of fields.
KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "True or False",
    tuple: "a list of values",
}


# --- ConfigDict -> Experiment ---------------------------------------------------------------


def resolve(config: Any, problems: Sequence[str] = ()) -> Experiment:
    """Turn a config into an experiment.

    Args:
      config: an ``ml_collections.ConfigDict`` (or nested dicts) with the fields above.
      problems: what is known to be wrong already, to be said in the same message.

    Returns:
      The experiment, checked.

    Raises:
      UserError: one message with every violation.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    found: list[str] = []
    experiment = _build(Experiment, values, "", found)
    if not found:
        found = violations(experiment)
    found = [*problems, *found]
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        lines = "\n".join(f"  - {problem}" for problem in found)
        raise UserError(f"{len(found)} things cannot be used:\n{lines}")
    return experiment


def _build(cls: type, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    built = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if field.name in values:
            built[field.name] = _convert(hints[field.name], values[field.name], name, problems)
        elif field.default is dataclasses.MISSING:
            problems.append(f"{name} is missing")
    for key in values.keys() - hints.keys():
        near = difflib.get_close_matches(str(key), list(hints), n=1)
        meant = f"; did you mean {prefix}{near[0]}?" if near else ""
        problems.append(f"{prefix}{key} is no field of the config{meant}")
    return None if problems else cls(**built)


def _convert(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """One value as its declared type, or a line in ``problems``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, f"{name}.", problems)
    elif origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        words = [a for a in kinds if get_origin(a) is Literal]
        kind = words[0] if words and isinstance(value, str) else kinds[0]
        return _convert(kind, value, name, problems)
    elif origin is Literal:
        return _convert(str, value, name, problems)  # which strings: violations()
    elif origin is tuple:
        if arguments[0] is str:  # "a,b" is ("a", "b"), also as the one value of a flag
            value = (value,) if isinstance(value, str) else value
            if all(isinstance(v, str) for v in value):
                value = [part.strip() for v in value for part in v.split(",") if part.strip()]
        if isinstance(value, (list, tuple)):
            if arguments[-1] is not Ellipsis and len(value) != len(arguments):
                problems.append(f"{name} is {value!r}; it needs {len(arguments)} values")
                return None
            return tuple(
                _convert(arguments[0], v, f"{name}[{i}]", problems) for i, v in enumerate(value)
            )
    elif origin is dict:
        if isinstance(value, dict):
            return {k: _convert(arguments[1], v, f"{name}.{k}", problems) for k, v in value.items()}
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint):
        return value
    what = KINDS.get(origin or hint, "a group of fields")
    problems.append(f"{name} is {value!r}; it must be {what}")
    return None


# --- what must hold between fields ----------------------------------------------------------


def violations(e: Experiment) -> list[str]:
    """Everything wrong with an experiment that can be known without its data."""
    from prism_jax import combinations
    from prism_jax.core import ensemble, losses, schedules
    from prism_jax.data import datasets, sources
    from prism_jax.models import ARCHITECTURES

    found: list[str] = []

    def positive(section: str, *names: str) -> None:
        for name in names:
            value = getattr(getattr(e, section), name)
            if value is not None and not value > 0:
                found.append(f"{section}.{name} is {value}; it must be positive")

    def not_negative(section: str, *names: str) -> None:
        for name in names:
            value = getattr(getattr(e, section), name)
            if value < 0:
                found.append(f"{section}.{name} is {value}; it must be zero or positive")

    def unit_interval(section: str, *names: str) -> None:
        for name in names:
            value = getattr(getattr(e, section), name)
            if not 0 < value <= 1:
                found.append(f"{section}.{name} is {value}; it must be in (0, 1]")

    def one_of(name: str, value: str, table: typing.Iterable[str]) -> None:
        if value not in (allowed := list(table)):
            near = difflib.get_close_matches(value, allowed, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            found.append(f"{name} is {value!r}{meant}; allowed: {', '.join(sorted(allowed))}")

    for name, group in {
        **{field.name: getattr(e, field.name) for field in dataclasses.fields(e)},
        **{f"networks.{name}": network for name, network in e.networks.items()},
    }.items():
        hints = typing.get_type_hints(type(group)) if dataclasses.is_dataclass(group) else {}
        for field, hint in hints.items():
            if get_origin(hint) is Literal:
                one_of(f"{name}.{field}", getattr(group, field), get_args(hint))

    positive("dataset", "image_size", "num_classes", "threads")
    positive("squeeze", "epochs", "batch_size", "learning_rate")
    positive("recover", *combinations.POSITIVE)
    positive(
        "relabel",
        "epochs",
        "batch_size",
        "mix_alpha",
        "prior_temperature",
        "bn_group",
        "top_k",
    )
    positive(
        "validate",
        "epochs",
        "batch_size",
        "accumulate",
        "learning_rate",
        "temperature",
        "gamma",
        "warmup_start",
        "eval_every",
        "checkpoint_seconds",
    )
    positive("parallel", "train_devices", "recover_devices")
    positive("analyse", "grid_classes", "grid_slots")
    not_negative("dataset", "workers", "cache_gigabytes")
    not_negative("recover", *combinations.NOT_NEGATIVE)
    not_negative("squeeze", "weight_decay", "seed")
    not_negative("validate", "weight_decay", "ce_weight")
    for section in ("squeeze", "recover", "relabel"):
        unit_interval(section, "crop_min")
    for name, value in {
        **{f"betas[{i}]": beta for i, beta in enumerate(e.recover.betas)},
        "ema": e.recover.ema,
        "drop": e.recover.drop,
    }.items():
        if not 0 <= value < 1:
            found.append(f"recover.{name} is {value}; it must be in [0, 1)")
    for name in combinations.SHARES:
        if not 0 <= (value := getattr(e.recover, name)) <= 1:
            found.append(f"recover.{name} is {value}; it must be in [0, 1]")
    if e.recover.jpeg_quality is not None and not 1 <= e.recover.jpeg_quality <= 95:
        found.append(f"recover.jpeg_quality is {e.recover.jpeg_quality}; it must be in [1, 95]")
    for section in ("squeeze", "recover", "relabel"):
        if (pad := getattr(e, section).crop_pad) is not None and pad < 0:
            found.append(f"{section}.crop_pad is {pad}; it must be zero or positive")
    if e.relabel.patch_shuffle < 1 or e.dataset.image_size % e.relabel.patch_shuffle:
        found.append(
            f"relabel.patch_shuffle is {e.relabel.patch_shuffle}; it must divide "
            f"dataset.image_size={e.dataset.image_size} into equal bands (1: none)"
        )
    if e.seed < 0:
        found.append(f"seed is {e.seed}; it must be zero or positive")
    if not e.validate.seeds or min(e.validate.seeds) < 0 or _repeated(e.validate.seeds):
        found.append(
            f"validate.seeds is {e.validate.seeds}; it must be one or more different numbers, "
            f"zero or positive"
        )

    from prism_jax import training

    if not e.dataset.name.startswith(datasets.TFDS):
        one_of("dataset.name", e.dataset.name, [*datasets.DATASETS, f"{datasets.TFDS}<builder>"])
    elif e.dataset.source != "tfds":
        found.append(
            f"dataset.source is {e.dataset.source!r}; dataset.name={e.dataset.name} needs 'tfds'"
        )
    one_of("dataset.source", e.dataset.source, sources.SOURCES)
    if (e.dataset.mean is None) != (e.dataset.std is None) or (
        e.dataset.mean and e.dataset.std and len(e.dataset.mean) != len(e.dataset.std)
    ):
        found.append(
            f"dataset.mean is {e.dataset.mean} and dataset.std is {e.dataset.std}; they belong "
            f"together, with one number per channel each"
        )
    if e.dataset.std and min(e.dataset.std) <= 0:
        found.append(f"dataset.std is {e.dataset.std}; its numbers must be positive")
    one_of("squeeze.optimiser", e.squeeze.optimiser, training.OPTIMISERS)
    one_of("squeeze.schedule", e.squeeze.schedule, schedules.SCHEDULES)
    for name, allowed in combinations.choices().items():
        values = getattr(e.recover, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None:
                one_of(f"recover.{name}", value, allowed)
    one_of("relabel.ensemble", e.relabel.ensemble, ensemble.ENSEMBLES)
    one_of("validate.loss", e.validate.loss, losses.STUDENT_LOSSES)
    one_of("validate.optimiser", e.validate.optimiser, training.OPTIMISERS)
    one_of("validate.schedule", e.validate.schedule, schedules.SCHEDULES)
    for control in e.validate.controls:
        one_of("validate.controls", control, CONTROLS)
    for control in _repeated(e.validate.controls):
        found.append(f"validate.controls names {control} twice")
    if "random_real" in e.validate.controls and not e.soft_labels:
        others = ",".join(c for c in e.validate.controls if c != "random_real") or "()"
        found.append(
            "validate.controls names random_real, whose labels are soft, and with "
            f"validate.loss='ce' no set has such; leave it out: --config.validate.controls={others}"
        )

    used = {
        "squeeze.teachers": e.squeeze.teachers,
        "recover.pool": e.recover.pool,
        "relabel.teachers": e.relabel.teachers,
        "validate.students": e.validate.students,
        "analyse.network": (e.analyse.network,) if e.analyse.network else (),
    }
    for field, names in used.items():
        optional = {"analyse.network", "squeeze.teachers"}
        if not e.recover.iterations:
            optional.add("recover.pool")
        if not names and field not in optional:
            found.append(f"{field} is empty; it needs at least one network")
        for name in _repeated(names):
            found.append(f"{field} names {name} twice")
    for name in dict.fromkeys(n for names in used.values() for n in names):
        where = next(field for field, names in used.items() if name in names)
        network = e.network(name)
        one_of(f"{where}: the architecture of {name}", network.architecture, ARCHITECTURES)
        if network.architecture in ARCHITECTURES:
            smallest = ARCHITECTURES[network.architecture].min_image_size.get(network.stem, 1)
            if e.dataset.image_size < smallest:
                found.append(
                    f"dataset.image_size is {e.dataset.image_size}, and {name} "
                    f"({network.architecture} with the {network.stem} stem) needs {smallest} or "
                    f"more; enlarge the images, set networks.{name}.stem='small', or leave it out"
                )
    for name, network in e.networks.items():
        for field in ("width", "depth"):
            if not getattr(network, field) > 0:
                found.append(
                    f"networks.{name}.{field} is {getattr(network, field)}; it must be positive"
                )
    for field in ("recover.pool", "relabel.teachers", "analyse.network"):
        for name in used[field]:
            if name not in e.squeeze.teachers:
                found.append(
                    f"{field} names {name}, which squeeze.teachers does not; a network that "
                    f"supervises must be trained or imported there "
                    f"(squeeze.teachers: {', '.join(e.squeeze.teachers)})"
                )

    if e.recover.pool and e.recover.primary not in e.recover.pool:
        found.append(
            f"recover.primary is {e.recover.primary!r}, which is not in recover.pool "
            f"({', '.join(e.recover.pool)}); name one of the pool"
        )
    if min(e.validate.batch_size, e.relabel.batch_size) > 0 and (
        e.validate.batch_size != e.relabel.batch_size
    ):
        found.append(
            f"validate.batch_size is {e.validate.batch_size} but relabel.batch_size is "
            f"{e.relabel.batch_size}; students train in the batches that were labelled, and "
            f"controls are trained alike: give both the same"
        )
    if e.relabel.ensemble == "single" and len(e.relabel.teachers) > 1:
        found.append(
            f"relabel.ensemble is 'single' but relabel.teachers has "
            f"{len(e.relabel.teachers)}; name one teacher or choose another ensemble"
        )
    if e.relabel.ensemble == "half_primary" and len(e.relabel.teachers) < 2:
        found.append("relabel.ensemble is 'half_primary'; relabel.teachers must name two or more")
    if e.relabel.ensemble == "committee" and len(e.relabel.priors or ()) != len(e.relabel.teachers):
        found.append(
            f"relabel.ensemble is 'committee' and relabel.priors is {e.relabel.priors}; it must "
            f"be {len(e.relabel.teachers)} numbers, one per teacher of relabel.teachers: the "
            f"accuracy in percent that each reaches alone"
        )
    if e.relabel.bn_group is not None and e.relabel.teacher_mode == "eval":
        found.append(
            f"relabel.bn_group is {e.relabel.bn_group}, which has no part where "
            f"relabel.teacher_mode is 'eval'; set it to 'train', or unset relabel.bn_group"
        )
    if e.relabel.top_k is not None and e.relabel.top_k >= e.dataset.num_classes:
        found.append(
            f"relabel.top_k is {e.relabel.top_k}; it must be smaller than dataset.num_classes="
            f"{e.dataset.num_classes}, or unset to keep all"
        )
    sizes = e.recover.ipc, e.dataset.num_classes, e.recover.slots_per_batch, e.recover.batch_size
    layout = None
    if all(size is None or size > 0 for size in sizes) and e.recover.budget in schedules.BUDGETS:
        try:
            layout = batch_layout(e)
        except UserError as error:
            found.append(str(error))
        else:
            found += _spans(e, layout)
    found += combinations.refusals(e, layout)
    if e.recover.initialise == "folder" and not e.recover.initialise_from:
        found.append(
            "recover.initialise is 'folder'; name the folder of images with "
            "recover.initialise_from=DIR"
        )
    if e.recover.initialise_from and e.recover.initialise != "folder":
        found.append(
            f"recover.initialise_from names {e.recover.initialise_from}, but recover.initialise is "
            f"{e.recover.initialise!r}, which reads no folder; set recover.initialise=folder"
        )
    found += _training_violations(e)
    return found


def bn_group_of(validate: Validate) -> int:
    """Images that a BatchNorm of a student sees at a time."""
    if validate.bn_group == "all":
        return validate.batch_size
    return validate.bn_group or validate.batch_size // validate.accumulate


def _training_violations(e: Experiment) -> list[str]:
    """What is wrong with how students are trained, and teachers' batches shared."""
    from prism_jax.core import batching, schedules

    v, found = e.validate, []
    if v.schedule in schedules.SCHEDULES:
        takes = schedules.values_of(v.schedule)
        for name in ("zeta", "milestones", "gamma"):
            if getattr(v, name) is not None and name not in takes:
                found.append(
                    f"validate.{name} is {getattr(v, name)}, but the schedule {v.schedule} has "
                    f"none; leave it unset, or choose another validate.schedule"
                )
    if v.schedule == "multistep" and not v.milestones:
        found.append(
            "validate.schedule is 'multistep'; validate.milestones must say at which fractions of "
            "the run, such as (0.8, 0.9)"
        )
    marks = (0.0, *(v.milestones or ()), 1.0)
    if any(after <= before for before, after in zip(marks, marks[1:], strict=False)):
        found.append(
            f"validate.milestones is {v.milestones}; it must be rising fractions of the run, "
            f"between 0 and 1"
        )
    if v.zeta is not None and v.zeta < 1:
        found.append(f"validate.zeta is {v.zeta}; it must be 1 or more runs")
    if not 0 <= v.warmup_epochs < v.epochs:
        found.append(
            f"validate.warmup_epochs is {v.warmup_epochs}; it must be zero or positive, and below "
            f"validate.epochs={v.epochs}"
        )
    if not 0 <= v.momentum < 1:
        found.append(f"validate.momentum is {v.momentum}; it must be in [0, 1)")
    if v.nesterov and (v.optimiser != "sgd" or not v.momentum):
        found.append(
            f"validate.nesterov needs validate.optimiser='sgd' with momentum, not "
            f"{v.optimiser!r} with {v.momentum}"
        )
    if v.ema is not None and not 0 < v.ema < 1:
        found.append(f"validate.ema is {v.ema}; it must be between 0 and 1, or unset")
    if v.ema is None and not v.ema_statistics:
        found.append(
            "validate.ema_statistics is False, which has no part where validate.ema is unset; set "
            "validate.ema, or leave it True"
        )

    if v.batch_size <= 0 or v.accumulate <= 0:
        return found  # said above
    part, rest = divmod(v.batch_size, v.accumulate)
    if rest:
        return [
            *found,
            f"validate.batch_size {v.batch_size} does not divide into "
            f"validate.accumulate={v.accumulate} equal parts",
        ]
    if isinstance(v.bn_group, str) and v.bn_group != "all":
        found.append(
            f"validate.bn_group is {v.bn_group!r}; it must be a number of images, 'all', or unset"
        )
    elif v.bn_group == "all" and v.accumulate > 1:
        found.append(
            f"validate.bn_group is 'all', one BatchNorm group over the whole batch, which "
            f"validate.accumulate={v.accumulate} parts, one after the other, cannot share; set "
            f"validate.accumulate=1, or a group of at most {part} images"
        )
    elif isinstance(v.bn_group, int) and (v.bn_group <= 0 or part % v.bn_group):
        allowed = [g for g in range(1, part + 1) if part % g == 0]
        found.append(
            f"validate.bn_group is {v.bn_group}; batch_size / accumulate = {part} images must be "
            f"whole groups: {', '.join(map(str, allowed))}"
        )
    elif (devices := e.parallel.train_devices) and devices > 0:
        group = {"accumulate": v.accumulate, "bn_group": bn_group_of(v)}
        batches = {"validate": (v.batch_size, group)}
        if any(not e.network(name).checkpoint for name in e.squeeze.teachers):
            batches["squeeze"] = e.squeeze.batch_size, {}
        for section, (size, division) in batches.items():
            if size > 0 and not batching.fits(size, devices, **division):
                allowed = [d for d in range(1, size + 1) if batching.fits(size, d, **division)]
                groups = f" in BatchNorm groups of {bn_group_of(v)}" if division else ""
                found.append(
                    f"parallel.train_devices is {devices}; {section}.batch_size={size}{groups} "
                    f"can be shared by {', '.join(map(str, allowed))} device(s)"
                )
    return found


def _repeated(values: Sequence[Any]) -> list[Any]:
    return sorted({value for value in values if values.count(value) > 1})


def _spans(e: Experiment, layout: Layout) -> list[str]:
    """What is wrong with an image batch that spans devices."""
    span, size = e.parallel.recover_devices, layout.slots * layout.classes
    if span < 2:
        return []
    found = []
    if size % span:
        allowed = [d for d in range(1, size + 1) if size % d == 0]
        found.append(
            f"parallel.recover_devices is {span}, among which the {size} images of a batch do not "
            f"divide; these do: {', '.join(map(str, allowed))}"
        )
    if e.parallel.map == "pmap":
        found.append(
            "parallel.map is 'pmap', which gives every device a batch of its own; with "
            f"parallel.recover_devices={span} leave it at 'shard_map'"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the set divides into image batches: (slot groups) x (blocks of classes)."""

    slots: int
    classes: int
    groups: int
    blocks: int


def batch_layout(e: Experiment) -> Layout:
    """Slots and classes per batch, and how many groups and blocks that makes.

    ``batch_size = slots x classes``. Unset, it means all classes, at most 100.

    Raises:
      UserError: a stated size that does not divide.
    """
    ipc, classes_total = e.recover.ipc, e.dataset.num_classes
    slots = e.recover.slots_per_batch or (ipc if e.recover.batch_order == "class_major" else 1)
    if ipc % slots:
        raise UserError(
            f"recover.slots_per_batch is {slots}, which does not divide recover.ipc={ipc}"
        )
    if e.recover.batch_size is None:
        classes = max(c for c in range(1, 101) if classes_total % c == 0 and c <= classes_total)
    else:
        classes, rest = divmod(e.recover.batch_size, slots)
        if rest or not classes or classes_total % classes:
            allowed = [slots * c for c in range(1, classes_total + 1) if classes_total % c == 0]
            near = sorted(sorted(allowed, key=lambda a: abs(a - e.recover.batch_size))[:5])
            raise UserError(
                f"recover.batch_size is {e.recover.batch_size}, which does not divide into "
                f"{slots} slot(s) x an equal share of {classes_total} classes; near it these do: "
                f"{', '.join(map(str, near))}"
            )
    budgets = {budget_of(e, slot) for slot in range(slots)} if slots > 1 else set()
    if len(budgets) > 1:
        raise UserError(
            f"recover.budget {e.recover.budget!r} gives the slots of one batch different "
            f"iterations {sorted(budgets)}; use recover.slots_per_batch=1 or budget='constant'"
        )
    return Layout(slots, classes, ipc // slots, classes_total // classes)


def budget_of(e: Experiment, slot: int) -> int:
    """Iterations that the images of a slot receive."""
    from prism_jax.core.schedules import BUDGETS

    return BUDGETS[e.recover.budget](e.recover.iterations, slot)
