"""The experiment as frozen dataclasses, one per stage.

Field names here are the field names of the config and of ``--config.<section>.<field>=...``.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, NewType

Path = NewType("Path", str)  # a field in which ``~`` is the home directory

STAGES = ("squeeze", "recover", "relabel", "validate", "analyse")
CONTROLS = ("random_real", "random_real_hard", "full_real")
# Real images chosen in a teacher's features, by the initialisers of the same names.
SELECTED_CONTROLS = ("real_herding", "real_feature_medoids", "real_confident", "real_balanced")
# The synthetic images with their hard labels: what is left of a set without a teacher's answers.
HARD_CONTROL = "synthetic_hard"
# Those of generated images: anchors as they are, the real images nearest to them, images of none.
ANCHOR_CONTROLS = ("decoded_anchors", "medoids")  # each counts as the image of its anchor does
GENERATED_CONTROLS = (*ANCHOR_CONTROLS, "no_anchors")
# Those that are labelled as the synthetic set is; their images are kept beside their labels.
SOFT_CONTROLS = ("random_real", *SELECTED_CONTROLS, *GENERATED_CONTROLS)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Which real images; their constants stand in ``data.datasets``.

    ``damaged`` says what a damaged image does: stop the run, or be left out of the set.
    ``threads`` and ``workers`` (processes) read ahead; they change no batch. A set of images that
    takes more than ``cache_gigabytes`` decoded is read from disk whenever it is needed.
    ``mean`` and ``std`` replace the normalisation of the data set.
    ``held_out`` is the share of every class' training images, drawn by ``held_out_seed``, that
    nothing is made of: students are tested on them too, so that settings and methods can be chosen
    without the test images.
    """

    name: str
    source: str
    path: Path | None
    image_size: int
    num_classes: int
    damaged: Literal["stop", "skip"]
    threads: int
    workers: int
    cache_gigabytes: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    held_out: float
    held_out_seed: int


@dataclasses.dataclass(frozen=True)
class Network:
    """One named network: an architecture of the registry, scaled, and where its weights are.

    ``checkpoint`` is a file or folder of weights; without one the network is trained by squeeze,
    from fresh weights or from those in ``start_from``, whose head is drawn anew where it has
    other classes. ``mean`` and ``std`` state the normalisation of the weights of either (default:
    the dataset's).
    ``class_indices`` picks the dataset's classes from a larger head of ``head_classes``.
    ``weights_key`` says which of several networks in a file is meant, as "state_dict_ema".
    """

    architecture: str
    width: float = 1.0
    depth: float = 1.0
    stem: Literal["imagenet", "small"] = "imagenet"
    checkpoint: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    head_classes: int | None = None
    class_indices: tuple[int, ...] | None = None
    weights_key: str | None = None
    start_from: Path | None = None

    @property
    def weights(self) -> Path | None:
        """Where the weights from elsewhere are, imported as they are or trained further."""
        return self.checkpoint or self.start_from

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
    least_top1: float | None
    least_steps: int

    def epochs_over(self, images: int) -> int:
        """Epochs over a set of so many images: as stated, or as many as ``least_steps`` take."""
        return max(self.epochs, -(-self.least_steps // -(-images // self.batch_size)))


@dataclasses.dataclass(frozen=True)
class Recover:
    """Optimising pixels: one field or more per axis in which methods differ.

    What a field means stands beside its default in ``configs/base.py``; what may not be combined,
    in ``config.rules``.
    """

    maker: Literal["optimise", "generate"]
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
    alpha_ce: float
    # which statistics, and what they count
    alpha_bn: float
    first_bn_multiplier: float
    first_layer: Literal["bn", "conv"]
    count_no_bn: bool
    match: tuple[str, ...]
    targets: Literal["running", "groups"]
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
    clip: float
    clip_directory: Path | None
    clip_template: str
    perturb_rho: float
    perturb_steps: int
    perturb_probes: bool
    perturb_accumulates: bool
    # what is optimised
    parametrisation: str
    resolutions: tuple[int, ...]
    # batches
    batch_size: int | None
    slots_per_batch: int | None
    batch_order: Literal["ipc_major", "class_major"]
    # where images start, and what they go through
    initialise: str
    initialise_from: Path | None
    initialise_classes: tuple[str, ...] | None
    initialise_mean: tuple[float, ...] | None
    initialise_std: tuple[float, ...] | None
    initialise_whitening: Literal["none", "zca"] | None
    short_classes: Literal["refuse", "repeat"]
    scorer: str | None
    patch_factor: int
    patch_images: int
    patch_crops: int
    patch_choice: Literal["confident", "median"]
    phase_sizes: tuple[int, ...]
    inject: float
    inject_from: Literal["start", "retrieved"]
    inject_simplicity: float
    crop_min: float
    crop_curriculum: str
    crop_milestone: float
    crop_pad: int | None
    flip: bool
    roll: int
    roll_centred: bool
    view_noise: float
    rounding: Literal["nearest", "truncate"]
    jpeg_quality: int | None
    steps_per_dispatch: int
    dtype: Dtype
    checkpoint_seconds: float
    keep_at: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The diffusion transformer that squeeze trains: side of a token, and its size."""

    token: int
    width: int
    depth: int
    heads: int


@dataclasses.dataclass(frozen=True)
class Fit:
    """How it is trained; see ``diffusion.fit.Fitting``."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    class_dropout: float
    average: float


@dataclasses.dataclass(frozen=True)
class Refine:
    """How latents are refined before they are decoded; see ``diffusion.refine.Refining``."""

    steps: int
    learning_rate: float
    maximum: float
    window: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Images from a denoiser, where ``recover.maker`` is "generate".

    What a field means stands beside its default in ``configs/base.py``; what may not be combined,
    in ``config.rules``.
    """

    # the networks
    generator: Literal["dit", "stable_diffusion", "dit_released"]
    directory: Path | None
    transformer: Path | None
    codec: Literal["none", "patches", "directory"]
    patch: int
    components: int
    denoiser: Denoiser
    fit: Fit
    class_names: Path | None
    template: str
    negative: str
    dtype: Dtype
    batch_size: int
    # from real images to anchors
    encode_batch_size: int | None
    image_size: int | None
    view: Literal["cropped", "squashed"]
    most_images: int | None
    sampled: bool
    flip: bool
    anchors: str
    expand: int
    attempts: int
    outliers: float
    weighted: bool
    # from anchors to images
    sampler: str
    steps: int
    strength: float
    guidance: float
    guided_channels: int | None
    eta: float
    variance: str
    slip: bool
    clip: bool
    mode_weight: float
    mode_window: tuple[int, int] | None
    candidates: int
    judge: str | None
    refine: Refine
    resampler: str


@dataclasses.dataclass(frozen=True)
class Relabel:
    """Soft labels over augmented views.

    ``mode`` changes no bit: "online" makes the labels while students train, and stores none.
    ``order`` is that of the images in an epoch: "torch" is PyTorch's RandomSampler's, seed 42.
    ``labels_from`` takes the labels of the synthetic set from elsewhere.
    ``priors`` (percent, one per teacher) and ``prior_temperature`` are those of the ensemble
    "committee". ``teacher_mode`` "train" lets BatchNorm use the statistics of the batch, or of
    groups of ``bn_group`` images.
    """

    mode: Literal["store", "online"]
    order: Literal["own", "torch"]
    labels_from: Path | None
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
    """How work is shared by devices; changes no bit of recover and relabel, but for two fields.

    ``recover_devices`` share one image batch, with the statistics of the whole of it: for batches
    that one device does not hold. More than one give other bits, and enter recover's fingerprint.
    A network is trained on ``train_devices`` of them, unset on as many as share its batches.
    ``matmul_precision`` says what a GPU or TPU makes of float32 in convolutions and products; other
    than "high" it enters the fingerprint of everything that a network has made.
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
    generate: Generate
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
    def judge(self) -> str:
        """The teacher that says what generated images are worth."""
        return self.generate.judge or self.analyse.network or self.relabel.teachers[0]

    @property
    def label_parts(self) -> int:
        """Parts of a batch that share no BatchNorm group when labels are made in groups."""
        return self.validate.accumulate if self.relabel.bn_group else 1


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))
