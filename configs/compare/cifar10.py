"""All methods on CIFAR-10 with the recipes for a laptop: IPC 10, one seed of images.

    python -m prism_jax.compare --config=configs/compare/cifar10.py

What `digits.py:quick` compares, on natural images in colour: its narrow networks, its hundred
iterations, its protocol `single`, and mirrored views. Teachers learn the training images for five
epochs. The papers' own recipes take days without a GPU: `configs/methods/*.py:cifar10`.

Three students of every kind train on each set: the spread is theirs, not that of other images.
Another file of images: --config.dataset.source=npz --config.dataset.path=FILE.
"""

from ml_collections import ConfigDict

from configs.compare import digits


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    c = digits.get_config("quick")
    c.name = "compare_cifar10"
    c.ipcs = (10,)
    c.seeds = (0,)
    c.student_seeds = 3
    c.dataset = ConfigDict(
        dict(name="cifar10", source="cifar", path="data/cifar-10-batches-py", image_size=32)
    )
    flips = (f"{stage}.flip=True" for stage in ("squeeze", "recover", "relabel"))
    c.shared = (*c.shared, "squeeze.epochs=5", *flips)
    for row in ("fadrm", "fadrm_retrieved", "psm"):
        c.rows[row] = (*c.rows[row], "recover.phase_sizes=(28, 32, 28, 32)")
    del c.protocols["own"]
    return c
