"""G-VBSM: generalised matching of various backbones and statistics.

Paper: arXiv 2311.17950, CVPR 2024. Reports, ResNet-18: ImageNet-1K IPC 10 / 50 / 100:
31.4 / 51.8 / 55.7 %; Tiny-ImageNet IPC 50 / 100: 47.6 / 51.0 %; CIFAR-10 IPC 10 / 50:
53.5 / 59.2 %; CIFAR-100 IPC 1 / 10 / 50: 25.9 / 59.5 / 65.0 %.

    python -m prism_jax.main --config=configs/methods/gvbsm.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/gvbsm.py:digits

Teachers take turns, one per iteration, over all batches. Beside BatchNorms' statistics those of
every convolution's input are matched, by channel and by patch, in a moving average; they need one
pass over the training set, which squeeze makes. A batch is all images of a few classes, whose
Gram matrices are spread ("data densification").

Mended here, and how to bring it back:
  the multiplier of the first BatchNorm falls on the first convolution
                                  :official (--config.recover.first_layer=conv)
  the moving average begins at zero   :official (--config.recover.ema_from_zero=True); that it
                                  also runs on from one batch into the next is not brought back
  pixels truncated; ImageNet: JPEG at quality 75        :official
  losses per GPU: a batch is 80 images on two GPUs, each half by itself but for the densification,
                                  which goes by class; here it is one
                                  ImageNet IPC 10: :official (--config.recover.batch_size=40)
  CIFAR-10 has CIFAR-100's normalisation   --config.dataset.mean and .std
  Tiny-ImageNet's teachers are those of epoch 40 of 50; CIFAR's statistics also take up the images
                                  of a verifier: not brought back
"""

from ml_collections import ConfigDict

from configs.methods import recipes

POOL = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")
SMALL_POOL = ("resnet18", "convnet_d3", "mobilenet_v2", "wrn_16_2", "shufflenet_v2_x0_5")


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("gvbsm", arg, datasets=recipes.DATASETS)
    statistics(c, at)
    if at.dataset == "tiny_imagenet" and at.ipc % 10 == 0:
        c.recover.slots_per_batch = slots = at.ipc // 10  # its images come in ten blocks of slots
        c.recover.batch_size = slots * max(1, 100 // slots)  # 100, in whole classes
    together = c.recover.slots_per_batch or at.ipc
    c.recover.densification = 1.0 if together > 1 else 0.0  # one image has nothing to spread
    c.relabel.teachers = c.recover.pool
    c.relabel.ensemble = "mean" if at.dataset in recipes.SMALL else "norm_mean"
    c.validate.loss, c.validate.ce_weight = "mse_gt", 0.1
    if at.dataset == "imagenet":
        c.recover.learning_rate = 0.1
    if at.dataset in recipes.SMALL:
        teachers(c, at)
        c.recover.learning_rate = 0.05
        c.recover.iterations = 4000
        c.recover.crop_pad = 8 if at.dataset == "tiny_imagenet" else 4
        c.recover.flip, c.recover.roll = True, 32
        students(c, at)
    if at.dataset == "cifar10":
        c.validate.weight_decay = 0.0
    if at.dataset == "tiny_imagenet":
        c.validate.accumulate = 2
    if at.official:
        if (at.dataset, at.ipc) == ("imagenet", 10):
            c.recover.batch_size = 40
        c.recover.first_layer = "conv"
        c.recover.ema_from_zero = True
        c.recover.rounding = "truncate"
        c.recover.jpeg_quality = 75 if at.dataset == "imagenet" else None
    return recipes.finish(c, at)


def statistics(c: ConfigDict, at: recipes.At) -> None:
    """What is matched, by whom, and in which batches: G-VBSM's, with which EDC begins."""
    small = at.dataset in recipes.SMALL
    c.recover.pool = SMALL_POOL if small else POOL
    c.recover.match = ("bn", "conv", "patch")
    c.recover.statistic_patch = 16 if at.dataset == "imagenet" else 4
    c.recover.ema = 0.8 if small else 0.4
    c.recover.drop = 0.4 if small else 0.0
    c.recover.batch_order = "class_major"
    # Whole classes: of ImageNet 8 of 10 images (at other IPC our choice), else up to 100 images.
    if at.dataset == "imagenet":
        c.recover.batch_size = at.ipc * {1: 100, 10: 8}.get(at.ipc, 1)
    elif small:
        many = [n for n in range(1, 101) if c.dataset.num_classes % n == 0 and n * at.ipc <= 100]
        c.recover.batch_size = at.ipc * max(many, default=1)


def teachers(c: ConfigDict, at: recipes.At) -> None:
    """The small sets' teachers, which EDC has too: barely trained."""
    c.squeeze.optimiser, c.squeeze.schedule = "sgd", "constant"
    c.squeeze.learning_rate, c.squeeze.weight_decay = 0.05, 0.0
    c.squeeze.batch_size, c.squeeze.epochs = 64, {"cifar10": 5}.get(at.dataset, 50)
    if at.dataset == "tiny_imagenet":
        c.squeeze.batch_size, c.squeeze.learning_rate = 128, 0.1
        c.squeeze.schedule = "cosine"


def students(c: ConfigDict, at: recipes.At) -> None:
    """The small sets' labels and students, which EDC has too."""
    c.relabel.crop_pad = None
    c.relabel.mix, c.relabel.mix_alpha = "cutmix", 1.0
    c.relabel.batch_size = c.validate.batch_size = {"cifar100": 64}.get(at.dataset, 100)
    c.relabel.epochs = c.validate.epochs = {"tiny_imagenet": 100}.get(at.dataset, 1000)
    c.validate.warmup_epochs, c.validate.decay = 0, "kernels"
    if at.dataset == "cifar10":
        c.validate.optimiser, c.validate.learning_rate, c.validate.weight_decay = (
            "adamw",
            1e-3,
            0.01,
        )
    else:
        c.validate.optimiser, c.validate.learning_rate, c.validate.weight_decay = "sgd", 0.1, 5e-4
    if at.dataset in recipes.CIFAR:
        c.validate.ce_weight = 0.15
