"""PRISM+: PRISM from selected real images, in small steps. Searched on CIFAR-10 at IPC 10.

PRISM: arXiv 2511.09905. This combination is ours and in no paper. The search was small: one seed,
the held-out training images, labels and training of the protocol `single`
(docs/results/cifar10.md has all that was tried). It is untested on other data.

    python -m prism_jax.main --config=configs/methods/prism_plus.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/prism_plus.py:digits

As prism.py, but
  start       the real images that the primary is surest of, in place of random ones
  rate        a fifth of PRISM's: images stay near real ones in contrast and in fine detail, which a
              student's BatchNorm would else see in training and not in tests
  iterations  250
  variation   a little weight on the total variation of a batch, which grows with the side of images
  labels      the mean logits of the pool
"""

from ml_collections import ConfigDict

from configs.methods import prism, recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin(
        "prism",
        arg,
        datasets=recipes.DATASETS,
        not_official="this combination is ours, and no released code has it",
    )
    c = prism.prism(c, at)
    c.recover.initialise = "real_confident"
    c.recover.learning_rate /= 5
    c.recover.iterations = 50 if "quick" in at.words else 250
    c.recover.total_variation = 0.002 * 32 / c.dataset.image_size
    c.relabel.teachers = c.recover.pool
    c.relabel.ensemble = "mean"
    return recipes.finish(c, at._replace(method="prism_plus"))
