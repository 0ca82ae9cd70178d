"""What sets give away of the images they were made from, on CIFAR-10.

    python -m prism_jax.audit --config=configs/audit/cifar10.py

What `digits.py` does, at 32 px: 5,000 of the 50,000 training images are canaries, and every shadow
run has half of them beside 5,000 others that all runs have. Hours on a GPU, days on two cores.
Another file of images: --config.dataset.source=npz --config.dataset.path=FILE.
"""

from ml_collections import ConfigDict

from configs.audit import digits


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    c = digits.get_config()
    c.name = "audit_cifar10"
    c.dataset = ConfigDict(
        dict(name="cifar10", source="cifar", path="data/cifar-10-batches-py", image_size=32)
    )
    c.canaries = 500
    c.always = 500
    flips = (f"{stage}.flip=True" for stage in ("squeeze", "recover", "relabel"))
    c.shared = (
        *c.shared, *flips, "squeeze.epochs=60", "squeeze.batch_size=128",
        "relabel.epochs=150", "validate.epochs=150", "validate.eval_every=150",
        "generate.denoiser.width=128", "generate.denoiser.depth=4", "generate.fit.steps=10000",
        "generate.steps=50",
    )  # fmt: skip
    course = ("recover.iterations=1000", "recover.roll=4")
    for row in ("without", "prism_real", "prism_noise", "sre2l_real", "sre2l_noise"):
        c.rows[row] = (*c.rows[row], *course)
    c.gradients.iterations = (0, 100, 300, 600, 999)
    return c
