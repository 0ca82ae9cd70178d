"""SRe2L: squeeze, recover and relabel.

Paper: arXiv 2306.13092, NeurIPS 2023. Reports, ResNet-18: ImageNet-1K IPC 10 / 50 / 100 / 200:
21.3 / 46.8 / 52.8 / 57.0 %; Tiny-ImageNet IPC 50 / 100: 41.1 / 49.7 %; CIFAR-100 IPC 10 / 50:
31.6 / 52.2 % (quoted by DWA).

    python -m prism_jax.main --config=configs/methods/sre2l.py:imagenet,ipc50
    python -m prism_jax.main --config=configs/methods/sre2l.py:digits

One network supervises both logits and BatchNorm statistics; images start as noise. The paper has
no CIFAR-10; its CIFAR-100 recipe is used there. Small sets' teachers are trained as DWA's are (200
epochs; Tiny-ImageNet 100), but that biases and norms do not decay; SRe2L's own for Tiny-ImageNet
has learning rate 0.2, weight decay 1e-4 and a warm-up. Students on Tiny-ImageNet: DWA's SGD for the
100 epochs in batches of 256 of SRe2L's script.

Mended here, and how to bring it back:
  pixels truncated, JPEG at quality 75      :official
  CIFAR: the teacher labels in train mode   :official (--config.relabel.teacher_mode=train)
  total variation and image norm have weight 0   --config.recover.total_variation, .image_l2
  small sets' normalisation differs between steps of the released code; here it is one
  "best images" are the last ones, nothing is seeded: not brought back
"""

from ml_collections import ConfigDict

from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("sre2l", arg, datasets=recipes.DATASETS)
    if at.dataset == "tiny_imagenet":
        c.recover.learning_rate = 0.1
        c.recover.alpha_bn = 1.0
        c.recover.roll_centred = True
    if at.official:
        recipes.as_released(c)
        if at.dataset in recipes.CIFAR:
            c.relabel.teacher_mode = "train"
    return recipes.finish(c, at)
