"""What the methods' configs share: SRe2L's recipe on every data set, which each changes.

The argument after the colon names a data set and what else may be wanted, separated by commas:

    python -m prism_jax.main --config=configs/methods/cda.py:tiny_imagenet,ipc50

  imagenet, tiny_imagenet, cifar100, cifar10, digits   the data set (default: imagenet)
  ipc1, ipc10, ipc50, ...                              images per class (default: ipc10)
  official    what the released code does where it is mended here, see the config's docstring;
              refused where there is no such thing
  imagenette  ImageNet's recipe on ten of its classes, with its networks
  smoke       ImageNet with 10 classes, 20 iterations, 2 epochs: runs on your paths in minutes
  quick       digits with a fifth of the iterations

A recipe that no paper gives is refused, except for the digits, whose recipes are ours: they keep
what makes a method itself and shrink the rest to a laptop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base, cifar10_ipc10, cifar10_teachers
from configs import digits as digits_config

DATASETS = ("imagenet", "tiny_imagenet", "cifar100", "cifar10", "digits")
SMALL = ("tiny_imagenet", "cifar100", "cifar10")
CIFAR = ("cifar100", "cifar10")
# Initial images that a teacher chooses: ``synthesis.start.ASKING``, which is not imported here, for
# a config is read before JAX is.
ASKING = (
    *("mosaic", "mosaic_shuffled", "real_median"),
    *("real_herding", "real_feature_medoids", "real_confident", "real_balanced"),
)

# torchvision's files, by the names under which it publishes them (IMAGENET1K_V1).
CHECKPOINTS = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "mobilenet_v2": "mobilenet_v2-b0353104.pth",
    "efficientnet_b0": "efficientnet_b0_rwightman-7f5810bc.pth",
    "shufflenet_v2_x0_5": "shufflenetv2_x0.5-f707e7126e.pth",
    "shufflenet_v2_x1_0": "shufflenetv2_x1-5666bf0f80.pth",
    "mnasnet1_0": "mnasnet1.0_top1_73.512-f206786ef8.pth",
    "densenet121": "densenet121-a639ec97.pth",
    "alexnet": "alexnet-owt-7be5be79.pth",
}
# Networks for 32 and 64 px that are not an architecture's small form.
SMALL_NETWORKS = {
    "mobilenet_v2": dict(architecture="mobilenet_v2", width=0.5, stem="small"),
    "convnet_w32": dict(architecture="convnet_d3", width=0.25),
}
DIGITS_NETWORKS = {
    **digits_config.NETWORKS,
    "alexnet": dict(architecture="alexnet", width=0.125, stem="small"),
    "vit": dict(architecture="vit_tiny_patch16_224", width=1 / 3, depth=0.25, stem="small"),
}
CIFAR10_NETWORKS = {
    **{
        name: dict(architecture=name, checkpoint=f"data/teachers/{file}")
        | cifar10_ipc10.NORMALISATION
        for name, file in cifar10_ipc10.CHECKPOINTS.items()
    },
    **SMALL_NETWORKS,
    **cifar10_teachers.NETWORKS,
    **{name: dict(architecture=name, stem="small") for name in ("convnet_d3", "convnet_d3_none")},
}
# At hand for overrides.
AT_HAND: dict[str, dict[str, Any]] = {"digits": DIGITS_NETWORKS, "cifar10": CIFAR10_NETWORKS}


class At(NamedTuple):
    """What a config was asked for."""

    method: str
    dataset: str
    ipc: int
    words: set[str]

    @property
    def official(self) -> bool:
        return "official" in self.words


def begin(
    method: str, arg: str, *, datasets: tuple[str, ...], not_official: str = ""
) -> tuple[ConfigDict, At]:
    """SRe2L's recipe on the data set of an argument.

    Args:
      not_official: why the word ``official`` changes nothing, where that is so.

    Raises:
      ValueError: an unknown word, one that means nothing here, or a data set for which the method
        has no recipe.
    """
    words = {word for word in arg.split(",") if word}
    named = [word for word in words if word in DATASETS] or ["imagenet"]
    ipcs = [int(w[3:]) for w in words if w.startswith("ipc") and w[3:].isdecimal()] or [10]
    rest = {w for w in words - {*named} if not (w.startswith("ipc") and w[3:].isdecimal())}
    only = {"imagenette": "imagenet", "smoke": "imagenet", "quick": "digits"}
    known = all(w == "official" or only.get(w) == named[0] for w in rest)
    if len(named) > 1 or len(ipcs) > 1 or ipcs[0] < 1 or not known:
        raise ValueError(
            f"argument {arg!r}; allowed: one of {', '.join(DATASETS)}, one ipc<number>, official, "
            f"imagenette or smoke (imagenet), quick (digits), separated by commas"
        )
    at = At(method, named[0], ipcs[0], rest)
    if at.dataset not in (*datasets, "digits"):
        there = f"its papers and code give {', '.join(datasets)}, and " if datasets else ""
        raise ValueError(f"{method} has no recipe for {at.dataset}; {there}there is one for digits")
    if at.official and not_official:
        raise ValueError(f"argument {arg!r}; leave out official: {not_official}")
    c = base.get_config()
    c.preset = c.recover.method = method
    c.recover.ipc = at.ipc
    c.recover.initialise = "noise"
    c.recover.pool = ("resnet18",)
    c.recover.learning_rate = 0.25
    c.recover.batch_size = 100
    c.relabel.crop_min = 0.08
    c.relabel.batch_size = c.validate.batch_size = 1024
    c.validate.loss = "kl"
    c.validate.ce_weight = 0.0
    c.validate.schedule = "cosine"
    {"imagenet": _imagenet, "tiny_imagenet": _tiny_imagenet, "digits": _digits}.get(
        at.dataset, _cifar
    )(c, at)
    return c, at


def _imagenet(c: ConfigDict, at: At) -> None:
    c.dataset.path = "data/imagenet"  # train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
    c.dataset.cache_gigabytes = 8.0  # the test images are 7.5: else decoded anew in every test
    if "imagenette" in at.words:  # before methods ask how many classes there are
        c.dataset.name, c.dataset.path = "imagenette", "data/imagenette2-320"
        c.dataset.num_classes = 10
    c.validate.controls = ("random_real", "random_real_hard")


def _tiny_imagenet(c: ConfigDict, at: At) -> None:
    c.dataset.name = "tiny_imagenet"
    c.dataset.path = "data/tiny-imagenet-200"
    c.dataset.image_size = 64
    c.dataset.num_classes = 200
    _trained_here(c, epochs=100, batch_size=256)
    c.squeeze.crop_pad = 8
    c.recover.roll = 4
    # The field's recipe for Tiny-ImageNet: SGD, five epochs of warm-up, T^2, everything decays.
    # Epochs and batch are those of SRe2L's scripts.
    c.relabel.epochs = c.validate.epochs = 100
    c.relabel.batch_size = c.validate.batch_size = 256
    c.validate.loss = "kl_t2"
    c.validate.optimiser = "sgd"
    c.validate.learning_rate = 0.2
    c.validate.weight_decay = 1e-4
    c.validate.warmup_epochs = 5
    c.validate.warmup_start = 0.01
    c.validate.decay = "all"
    c.validate.accumulate = 1
    c.validate.controls = ("random_real", "random_real_hard")


def _cifar(c: ConfigDict, at: At) -> None:
    c.dataset.name = at.dataset
    c.dataset.source = "cifar"
    c.dataset.path = {"cifar10": "data/cifar-10-batches-py", "cifar100": "data/cifar-100-python"}[
        at.dataset
    ]
    c.dataset.image_size = 32
    c.dataset.num_classes = int(at.dataset[5:])
    _trained_here(c, epochs=200, batch_size=128)
    c.squeeze.crop_pad = 4
    # SRe2L's small-set recipe: roll alone; MixUp, T = 30, 400 epochs.
    c.recover.batch_size = None
    c.recover.iterations = 1000
    c.recover.crop_min = 1.0
    c.recover.flip = False
    c.recover.roll = 4
    c.relabel.crop_pad = 4
    c.relabel.mix = "mixup"
    c.relabel.mix_alpha = 0.8
    c.relabel.epochs = c.validate.epochs = 400
    c.relabel.batch_size = c.validate.batch_size = 128
    c.validate.temperature = 30.0
    c.validate.accumulate = 1
    c.validate.decay = "all"
    c.validate.controls = ("random_real", "random_real_hard")


def _trained_here(c: ConfigDict, *, epochs: int, batch_size: int) -> None:
    c.squeeze.epochs = epochs
    c.squeeze.batch_size = batch_size
    c.squeeze.weight_decay = 5e-4


def _digits(c: ConfigDict, at: At) -> None:
    """Ours: what digits_ipc1.py and digits_ipc10.py do, with the method's own parts."""
    own = digits_config.config(ipc=at.ipc)
    for section in ("dataset", "squeeze", "analyse"):
        c[section] = own[section]
    for field in ("students", "controls"):
        c.validate[field] = own.validate[field]
    c.recover.batch_size = None
    c.recover.iterations = 100 if "quick" in at.words else 500
    c.recover.learning_rate = 0.1
    c.recover.flip = c.relabel.flip = False
    c.recover.roll = 2
    c.recover.statistic_patch = 4
    c.relabel.crop_min = 0.25
    c.relabel.epochs = c.validate.epochs = own.relabel.epochs
    c.relabel.batch_size = c.validate.batch_size = 50
    c.validate.accumulate = own.validate.accumulate


def finish(c: ConfigDict, at: At) -> ConfigDict:
    """Name the experiment, and get every network that supervises."""
    c.name = f"{at.method}_{at.dataset}_ipc{at.ipc}"
    for word in sorted(at.words):
        c.name += f"_{word}"
    r = c.recover
    asking = r.initialise in ASKING or r.inject_from == "retrieved"
    asked = (r.scorer or r.primary,) if asking else ()
    measuring = (c.analyse.network,) if c.analyse.network else ()
    c.squeeze.teachers = tuple(dict.fromkeys((*r.pool, *c.relabel.teachers, *asked, *measuring)))
    others = AT_HAND.get(at.dataset, {})
    for name in dict.fromkeys((*c.squeeze.teachers, *c.validate.students, *others)):
        if at.dataset == "imagenet":
            fields = {"architecture": name}
            if name in CHECKPOINTS and name in c.squeeze.teachers:
                fields["checkpoint"] = f"data/teachers/{CHECKPOINTS[name]}"
        else:
            known = others or SMALL_NETWORKS
            fields = known.get(name, {"architecture": name, "stem": "small"})
        c.networks[name] = base.network(**fields)
    if r.initialise.startswith("mosaic"):  # of more images than a method looks at: of all of those
        r.patch_images = max(r.patch_images, r.ipc * r.patch_factor**2)
    if "imagenette" in at.words:
        _imagenette(c)
    return _smoke(c) if "smoke" in at.words else c


def _imagenette(c: ConfigDict) -> None:
    r = c.recover
    slots = r.ipc if r.batch_order == "class_major" else r.slots_per_batch or 1
    if r.batch_size is not None and r.batch_size >= 10 * slots:
        r.batch_size = None  # all ten classes
    c.generate.class_names = None  # the data set's own
    for name in c.squeeze.teachers:
        c.networks[name].head_classes = 1000  # cut to the classes that the data has


def _smoke(c: ConfigDict) -> ConfigDict:
    c.dataset.num_classes = 10
    c.recover.ipc = min(c.recover.ipc, 2)
    c.recover.batch_size = None
    c.recover.steps_per_dispatch = 5
    if c.recover.iterations:
        c.recover.iterations = 20
    c.recover.perturb_steps = min(c.recover.perturb_steps, 2)
    c.recover.patch_images = 20
    c.relabel.epochs = c.validate.epochs = 2
    c.relabel.batch_size = c.validate.batch_size = 10
    for name in c.squeeze.teachers:
        c.networks[name].head_classes = 1000  # cut to the classes that the data has
    return c


def generated(c: ConfigDict, at: At) -> None:
    """Images from a denoiser: one that is read, and on the digits one of ours.

    Stable Diffusion's directory has unet/, vae/, text_encoder/, tokenizer/ and scheduler/; where
    the names of the classes are a file, it has a line a class, in the order of the labels.
    """
    c.recover.maker = "generate"
    c.recover.iterations = 0
    c.recover.pool = ()
    c.recover.initialise = "real"
    if at.dataset == "digits":
        c.recover.slots_per_batch = at.ipc  # one batch of all
        if "quick" in at.words:
            c.generate.fit.steps = 700
        return
    g = c.generate
    g.codec, g.clip = "directory", False
    g.batch_size = 8
    # About a hundred images are finished together, of whole classes: few places of their last
    # batch stay empty, and what is known of a class is read once.
    c.recover.batch_order, c.recover.batch_size = "class_major", None


def stable_diffusion(c: ConfigDict, at: At) -> None:
    """D4M's generator: Stable Diffusion 1.5 at 512 px, its own sampler."""
    if at.dataset == "digits":
        return
    g = c.generate
    g.generator, g.directory = "stable_diffusion", "data/stable-diffusion-v1-5"
    if at.dataset not in CIFAR:  # whose classes have names that prompts can say
        g.class_names = f"data/{at.dataset}_names.txt"
    g.template = "{}" if at.official else "a photo of a {}"
    g.negative = "cartoon, anime, painting"
    g.image_size, g.view = 512, "squashed"
    g.sampler, g.guidance = "pndm", 8.0
    g.anchors = "minibatch"


def dit(c: ConfigDict, at: At, *, guidance: float) -> None:
    """DiT-XL/2 at 256 px with its learned variance; on the digits the small one's."""
    g = c.generate
    g.sampler, g.steps, g.strength = "ddpm", 50, 1.0
    if at.dataset == "digits":
        if at.official:
            raise ValueError(
                f"argument digits with official; leave out official: what {at.method} has of the "
                f"released code is of DiT-XL/2, and the digits have a transformer of their own"
            )
        return
    g.generator, g.directory = "dit_released", "data/DiT-XL-2-256"
    g.image_size, g.guidance, g.variance = 256, guidance, "learned"
    if at.official:
        g.guided_channels = 3


def as_released(c: ConfigDict) -> None:
    """What all references do to pixels: float to uint8 by truncation, and JPEG."""
    c.recover.rounding = "truncate"
    c.recover.jpeg_quality = 75


def rded_students(c: ConfigDict, at: At) -> None:
    """The labels and students of RDED and DELT: small batches, half a cosine."""
    size = {1: 10, 10: 50, 50: 100, 100: 100}.get(at.ipc, 100)
    if at.dataset == "tiny_imagenet":
        size = 100
    elif c.dataset.num_classes >= 100:
        size *= 2
    c.relabel.mix, c.relabel.mix_alpha = "cutmix", 1.0
    c.relabel.crop_pad = None
    c.validate.loss, c.validate.temperature = "kl", 20.0
    c.validate.optimiser, c.validate.learning_rate, c.validate.weight_decay = "adamw", 1e-3, 0.01
    c.validate.warmup_epochs, c.validate.decay = 0, "kernels"
    c.validate.schedule = "half_cosine"
    if at.dataset != "digits":
        c.relabel.batch_size = c.validate.batch_size = size
        c.relabel.epochs = c.validate.epochs = 300
        c.validate.accumulate = 1


def rded_views(c: ConfigDict, at: At) -> int:
    """How RDED's images are seen, one of so many patches a side: shuffled, and cropped to one."""
    factor = 2 if at.dataset == "imagenet" else 1
    c.relabel.crop_min, c.relabel.patch_shuffle = 1 / factor, factor
    return factor


def batch_specific_labels(c: ConfigDict, at: At, *, zeta: float) -> None:
    """The labels and students of CV-DD and FADRM (BSSL).

    Batches of 16 in two halves, each of which is one BatchNorm group of teachers and student.

    Args:
      zeta: of the learning rate's cosine.
    """
    size = 10 if at.dataset == "digits" else 16
    c.relabel.batch_size = c.validate.batch_size = size
    c.relabel.teacher_mode, c.relabel.bn_group = "train", size // 2
    c.relabel.mix, c.relabel.mix_alpha = "cutmix", 1.0
    c.relabel.crop_pad = None
    c.validate.accumulate = 2
    c.validate.loss, c.validate.temperature = "kl", 20.0
    c.validate.optimiser, c.validate.learning_rate, c.validate.weight_decay = "adamw", 1e-3, 0.01
    c.validate.warmup_epochs, c.validate.decay = 0, "kernels"
    c.validate.schedule, c.validate.zeta = "cosine", zeta
    if at.dataset != "digits":
        c.relabel.epochs = c.validate.epochs = 300
