"""DWA: directed weight adjustment, a teacher that is perturbed for every batch.

Paper: arXiv 2409.17612, NeurIPS 2024. Reports, ResNet-18: ImageNet-1K IPC 10 / 50 / 100:
37.9 / 55.2 / 59.2 %; Tiny-ImageNet IPC 50 / 100: 52.8 / 56.0 %; CIFAR-10 IPC 10 / 50:
32.6 / 53.1 %; CIFAR-100: 39.6 / 60.9 %.

    python -m prism_jax.main --config=configs/methods/dwa.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/dwa.py:digits

Real images, squashed to squares; the variance counts more than the mean; before a batch begins,
all weights of its teacher move up the batch's cross entropy in K steps of length rho / K. With
rho 0 and variance weight 1 it is SRe2L from the same images.

Mended here, and how to bring it back:
  the perturbation is never undone, it grows over the batches of an IPC index
                                         :official (--config.recover.perturb_accumulates=True)
  the gradients of the K steps stay in the images' first gradient
                                         :official (--config.recover.perturb_probes=True)
  CIFAR: the teacher labels in train mode   :official (--config.relabel.teacher_mode=train)
  pixels truncated, JPEG at quality 75      :official
  the first of K steps also sees the weights' gradients of the batch before: not brought back, it
  would make a batch's bits depend on all that ran before it
  CIFAR-10's images are clipped and students trained with another standard deviation (0.2023)
  than the teacher's (0.2470): one normalisation here
  Tiny-ImageNet does not run as released (no clipping range, a missing module): it does here
CIFAR's initial images are a file there; here they are one image of each class per slot. Teachers
are trained as the paper's, but that biases and norms do not decay.
"""

from ml_collections import ConfigDict

from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("dwa", arg, datasets=recipes.DATASETS)
    c.recover.initialise = "real_squashed"
    c.recover.variance_weight = 2.0 if at.dataset == "imagenet" else 11.0
    c.recover.perturb_rho = 0.015
    c.recover.perturb_steps = 15 if at.dataset == "imagenet" else 12
    if at.dataset in ("imagenet", "tiny_imagenet"):
        c.recover.iterations = 2000
    if at.dataset == "imagenet":
        c.relabel.batch_size = c.validate.batch_size = 128
        c.validate.accumulate = 1
    if at.dataset == "tiny_imagenet":
        c.recover.learning_rate = 0.1
        c.recover.batch_size = 200
        c.relabel.epochs = c.validate.epochs = 200
        c.relabel.batch_size = c.validate.batch_size = 64
    if at.official:
        recipes.as_released(c)
        c.recover.perturb_accumulates = c.recover.perturb_probes = True
        if at.dataset in recipes.CIFAR:
            c.relabel.teacher_mode = "train"
    return recipes.finish(c, at)
