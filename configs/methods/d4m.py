"""D4M: images from Stable Diffusion, each begun from a prototype of its class.

Paper: arXiv 2407.15138, CVPR 2024. Reports, ResNet-18, ImageNet-1K IPC 10 / 50 / 100 / 200:
27.9 / 55.2 / 59.3 / 62.6 %; Tiny-ImageNet IPC 50 / 100: 46.2 / 51.4 %.

    python -m prism_jax.main --config=configs/methods/d4m.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/d4m.py:cifar10,ipc50
    python -m prism_jax.main --config=configs/methods/d4m.py:digits

Latents of all images of a class are clustered into IPC prototypes; each, under the noise of
strength 0.7, is denoised under the class's prompt and decoded. The paper's other sets are made by
the values of the one script that is released, ImageNet's, and labelled as SRe2L labels them. On the
digits the generator is a small transformer that squeeze trains, and guidance is 1.5.

Mended here, and how to bring it back (:official does so all at once):
  one pass of chunks of IPC latents     --config.generate.anchors=chunked_released, expand=1
  latents left over are dropped         the same
  latents are drawn, not the mean       --config.generate.sampled=True
  PNDM slips by a step                  --config.generate.slip=True
  the prompt is the bare name           --config.generate.template={}
  nothing is seeded                     not brought back
  real images are enlarged bilinearly for the codec (here bicubically, as images are reduced)
                                        not brought back
In neither form are images shown to the safety checker that comes with the networks.
"""

from ml_collections import ConfigDict

from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("d4m", arg, datasets=("imagenet", *recipes.SMALL))
    recipes.generated(c, at)
    recipes.stable_diffusion(c, at)
    g = c.generate
    if at.official:
        g.anchors, g.expand = "chunked_released", 1
        if at.dataset != "digits":
            g.sampled = g.slip = True
    return recipes.finish(c, at)
