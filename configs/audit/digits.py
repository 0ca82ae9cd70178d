"""What sets give away of the images they were made from, on the embedded digits.

    python -m prism_jax.audit --config=configs/audit/digits.py

Minutes on two cores; it can be stopped and continues. 400 of the 1,437 training images are
canaries, 40 of each class; a shadow run trains on a random half of them at 8 px, makes a set by
every row, and a student of each. Canaries of the other half are what it must be told from.

`without` is made in the same way from images none of which is a canary: nothing can be found
there. The medoids are training images: something must be found.
"""

from ml_collections import ConfigDict

POOL = "resnet18,mobilenet_v2,shufflenet_v2_x0_5"


def method(name: str, *overrides: str) -> tuple[str, ...]:
    return (f"configs/methods/{name}.py", *overrides)


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    c = ConfigDict()
    c.name = "audit_digits"
    c.argument = "digits"  # of every method's config, beside the IPC
    c.ipc = 10
    c.dataset = ConfigDict(dict(image_size=8))
    c.seed = 0  # of the canaries and of who has which
    c.shadows = 16  # runs; every canary is in half of them
    c.canaries = 40  # of each class
    c.always = 0  # other images of each class that every run has

    c.rows = ConfigDict(sort_keys=False)  # in the tables' order
    course = ("recover.iterations=100", "recover.roll=1")
    real, noise = ((*course, f"recover.initialise={start}") for start in ("real", "noise"))
    pool = f"recover.pool={POOL}"
    c.rows.without = method("prism", pool, *real)
    c.rows.medoids = method("d4m", "generate.anchors=medoid", "generate.strength=0.0")
    c.rows.prism_real = method("prism", pool, *real)
    c.rows.prism_noise = method("prism", pool, *noise)
    c.rows.sre2l_real = method("sre2l", *real)
    c.rows.sre2l_noise = method("sre2l", *noise)
    for percent in (30, 70, 100):
        free = ("generate.anchors=none",) * (percent == 100)  # at which nothing of them is left
        c.rows[f"d4m_{percent}"] = method("d4m", f"generate.strength={percent / 100}", *free)
    c.without = ("without",)  # rows whose runs have other images in the place of the canaries

    c.shared = (
        f"squeeze.teachers={POOL}", "squeeze.epochs=30", "squeeze.batch_size=50",
        "squeeze.least_top1=0.0", "relabel.mode=online",
        "relabel.epochs=50", "validate.epochs=50", "validate.eval_every=50",
        "validate.students=resnet18", "validate.controls=()", "analyse.network=None",
        "generate.denoiser.token=4", "generate.denoiser.width=64", "generate.denoiser.depth=2",
        "generate.fit.steps=500", "generate.steps=25",
    )  # fmt: skip

    # Gradients along a row's synthesis: of so many images, one of a class, each is exchanged.
    c.gradients = ConfigDict()
    c.gradients.row = "prism_real"
    c.gradients.images = 6
    c.gradients.iterations = (0, 10, 30, 60, 99)
    c.gradients.alphas = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    c.gradients.draws = 512
    return c
