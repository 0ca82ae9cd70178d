"""What computing a network in bfloat16 does to all that PRISM reads from it.

    python benchmarks/precision.py --size=64 --out=benchmarks/results/precision_cpu
    python benchmarks/precision.py --weights=mobilenet_v2=data/teachers/mobilenet_v2-b0353104.pth

Each network computes in float64, float32 and bfloat16; parameters and BatchNorm statistics are
float32 at least in each. The images are cut from scikit-learn's two photographs. Weights are
drawn, and running statistics those of other cuts, unless a file is given. The table has relative
errors against float64 in the Euclidean norm: of the logits, of the BatchNorms' input means and
variances (over all layers, and the worst layer), and of the gradient by the pixels of cross
entropy + BN alignment, with its cosine.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform

os.environ.setdefault("NPROC", str(os.cpu_count()))

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from prism_jax.core import losses, pixels, statistics
from prism_jax.data import weights
from prism_jax.environment import commit
from prism_jax.models import ARCHITECTURES, build
from prism_jax.types import AnyArray, PyTree

POOL = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")
DTYPES = ("float32", "bfloat16")


def photographs(count: int, size: int, seed: int) -> np.ndarray:
    """Random cuts of two photographs, normalised as ImageNet: float64 (count, size, size, 3)."""
    random, cuts = np.random.default_rng(seed), []
    for i in range(count):
        photograph = Image.fromarray(load_sample_images().images[i % 2])
        side = int(random.integers(min(photograph.size) // 3, min(photograph.size)))
        left, top = (int(random.integers(0, n - side + 1)) for n in photograph.size)
        cut = photograph.crop((left, top, left + side, top + side))
        cuts.append(np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC)))
    mean, std = np.array(pixels.IMAGENET.mean), np.array(pixels.IMAGENET.std)
    return (np.stack(cuts) / 255 - mean) / std


def drawn_variables(module, images_BHWC: AnyArray) -> PyTree:
    """Fresh weights, with the statistics of some images as running statistics."""
    key = jax.random.key(0, impl="threefry2x32")
    images_BHWC = jnp.asarray(images_BHWC, jnp.float32)
    variables = jax.jit(module.init)(key, images_BHWC[:1])

    def told(variables):
        return module.apply(
            variables, images_BHWC, train=True, mutable=["bn_statistics"], rngs={"dropout": key}
        )[1]

    return {**variables, "batch_stats": jax.jit(told)(variables).get("bn_statistics", {})}


def read(name: str, variables: PyTree, images_BHWC: np.ndarray, stem: str, dtype: str) -> dict:
    """What PRISM reads, as float64 arrays: logits, means and variances per layer, gradient."""
    wide = np.float64 if dtype == "float64" else np.float32
    first = ARCHITECTURES[name].first_bn
    with jax.enable_x64(dtype == "float64"):
        module = build(name, ARCHITECTURES[name].classes, stem=stem, dtype=jnp.dtype(dtype))
        variables, images_BHWC = jax.tree.map(
            lambda x: np.asarray(x, wide), (variables, images_BHWC)
        )
        labels_B = np.arange(len(images_BHWC), dtype=np.int32)

        def energy(images_BHWC):
            logits_BK, told = module.apply(variables, images_BHWC, mutable=["bn_statistics"])
            logits_BK = logits_BK.astype(wide)
            loss, layers = losses.cross_entropy(logits_BK, labels_B), {}
            if first:
                layers = statistics.by_layer(told["bn_statistics"])
                loss += 0.01 * statistics.alignment(
                    layers,
                    statistics.by_layer(variables["batch_stats"]),
                    first=first,
                    first_multiplier=10.0,
                )
            return loss, (logits_BK, list(layers.values()))

        gradient, (logits, layers) = jax.jit(jax.grad(energy, has_aux=True))(images_BHWC)
    found = {"logits": [logits], "gradient": [gradient]}
    found |= {what: [layer[what] for layer in layers] for what in ("mean", "var")}
    return {k: [np.asarray(v, np.float64).ravel() for v in vs] for k, vs in found.items()}


def relative(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def compare(found: dict, true: dict) -> dict[str, float]:
    """Relative errors, and the cosine of the gradients."""
    errors = {}
    for what, parts in true.items():
        if parts:
            errors[what] = relative(np.concatenate(found[what]), np.concatenate(parts))
            errors[f"{what} worst"] = max(map(relative, found[what], parts))
    (a,), (b,) = found["gradient"], true["gradient"]
    errors["cosine"] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return errors


def table(found: dict) -> str:
    """The results in Markdown."""
    machine = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    heads = ("logits", "mean", "mean worst", "var", "var worst", "gradient", "cosine")
    lines = [
        f"Commit {found['commit']}; {machine}; {found['batch']} images of {found['size']} px.",
        "",
        f"| network | weights | dtype | {' | '.join(heads)} |",
        f"|:--|:--|:--|{'--:|' * len(heads)}",
    ]
    for row in found["rows"]:
        forms = {what: "{:.4f}" if what == "cosine" else "{:.1e}" for what in heads}
        cells = [forms[what].format(row[what]) if what in row else "-" for what in heads]
        start = (row["architecture"], row["weights"], row["dtype"])
        lines.append(f"| {' | '.join([*start, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architectures", default=",".join(POOL))
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="number of images")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    files = dict(given.split("=", 1) for given in arguments.weights)
    size, batch = arguments.size, arguments.batch
    found = {
        "commit": commit(),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.machine(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
        "size": size,
        "batch": batch,
        "rows": [],
    }
    images, others = (photographs(n, size, seed) for n, seed in ((batch, 0), (64, 1)))
    for name in arguments.architectures.split(","):
        # Published weights are for the stem of ImageNet.
        stem = "small" if size <= 64 and name not in files else "imagenet"
        classes = ARCHITECTURES[name].classes
        if name in files:
            variables = weights.load(files[name], name, classes, image_shape=(size, size, 3))
        else:
            variables = drawn_variables(build(name, classes, stem=stem), others)
        variables = jax.tree.map(np.asarray, variables)
        true = read(name, variables, images, stem, "float64")
        for dtype in DTYPES:
            row = compare(read(name, variables, images, stem, dtype), true)
            source = pathlib.Path(files[name]).name if name in files else "drawn"
            found["rows"].append({"architecture": name, "weights": source, "dtype": dtype, **row})
            print(table({**found, "rows": found["rows"][-1:]}).splitlines()[-1], flush=True)
    print(table(found))
    measuring.save(found, table(found), arguments.out)


if __name__ == "__main__":
    main()
