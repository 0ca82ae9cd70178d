"""PRISM+: PRISM's axes, combined as a first pilot suggests. NOT YET SEARCHED.

PRISM: arXiv 2511.09905. Reports nothing: this combination is ours and in no paper. It is what a
pilot pointed to (CIFAR-10 at IPC 10, one seed, differences near its standard error of 1.5 points):
more images that share a batch's statistics, fewer iterations and a larger weight of statistics each
lost less of what real images have. No value here was searched; none is claimed to be best.

    python -m prism_jax.main --config=configs/methods/prism_plus.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/prism_plus.py:digits

As prism.py, but
  start       selected real images, balanced between centres and margins of clusters
  batches     all images of a class in one batch, of as many classes as make 100 images and of at
              least ten: of ten classes all images share their statistics
  draw        of the teachers whose statistics are aligned: anew in every iteration, since one draw
              would else serve a whole set
  iterations  200
  alpha_bn    0.1
  labels      the mean logits of the pool
"""

from ml_collections import ConfigDict

from configs.methods import prism, recipes

CLASSES, IMAGES = 10, 100  # of a batch, at least


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("prism", arg, datasets=recipes.DATASETS)
    c = prism.prism(c, at)
    c.recover.initialise = "real_balanced"
    c.recover.batch_order = "class_major"
    c.recover.batch_size = at.ipc * min(c.dataset.num_classes, max(CLASSES, IMAGES // at.ipc))
    c.recover.granularity = "per_iteration"
    c.recover.iterations = 40 if "quick" in at.words else 200
    c.recover.alpha_bn = 0.1
    c.relabel.teachers = c.recover.pool
    c.relabel.ensemble = "mean"
    return recipes.finish(c, at._replace(method="prism_plus"))
