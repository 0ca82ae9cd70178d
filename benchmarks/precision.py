"""What computing a network in fewer bits does to all that PRISM reads from it.

    python benchmarks/precision.py --size=64 --out=benchmarks/results/precision_cpu
    python benchmarks/precision.py --weights=mobilenet_v2=data/teachers/mobilenet_v2-b0353104.pth

Each network computes in float64, float32 and bfloat16; parameters and BatchNorm statistics are
float32 at least in each. What other platforms make of float32 is emulated: the operands of every
convolution and product, forward and backward, are rounded as their matrix units do it, and sums
stay float32: ``tf32`` (10 bits of mantissa, GPU), ``bf16x1`` (7 bits, TPU) and ``bf16x3`` (two
parts of 7 bits each, three products). On a GPU or TPU ``--as-it-is`` measures what it does there.
The images are cut from scikit-learn's two photographs. Weights are drawn, and running statistics
those of other cuts, unless a file is given. The table has relative errors against float64 in the
Euclidean norm: of the logits, of the BatchNorms' input means and variances (over all layers, and
the worst layer), and of the gradient by the pixels of cross entropy + BN alignment, with its
cosine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import platform
from collections.abc import Callable
from unittest import mock

os.environ.setdefault("NPROC", str(os.cpu_count()))

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from jax import lax
from jax.extend.core import Literal
from PIL import Image
from sklearn.datasets import load_sample_images

from prism_jax import parallel
from prism_jax.core import losses, pixels, statistics, views
from prism_jax.data import weights
from prism_jax.environment import commit
from prism_jax.models import ARCHITECTURES, build
from prism_jax.types import AnyArray, PyTree

POOL = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")
DTYPES = ("float32", "bfloat16")


def to_tf32(x: jax.Array) -> jax.Array:
    """Round float32 to 10 bits of mantissa, to nearest even."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jnp.uint32(0xFFF) + ((bits >> 13) & 1)
    return lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFE000), jnp.float32)


def to_bf16(x: jax.Array) -> jax.Array:
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def in_one(round_) -> Callable:
    return lambda product, x, y: product(round_(x), round_(y))


def in_three(product, x, y):
    """Both operands as two parts; the product of the small parts is left out."""
    (x, x_rest), (y, y_rest) = ((to_bf16(z), to_bf16(z - to_bf16(z))) for z in (x, y))
    return product(x, y) + (product(x, y_rest) + product(x_rest, y))


# What "float32" can mean off the CPU: how a product is computed from its operands.
PRODUCTS = {"tf32": in_one(to_tf32), "bf16x3": in_three, "bf16x1": in_one(to_bf16)}


def emulate(how: str, function: Callable, *arguments):
    """Evaluate a function with every convolution and matrix product computed otherwise."""

    def evaluate(jaxpr, constants, arguments):
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

        def value(atom):
            return atom.val if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            values, parameters = [value(atom) for atom in equation.invars], equation.params
            primitive = equation.primitive
            inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
            if inner is not None:
                results = evaluate(inner.jaxpr, inner.consts, values)
            elif primitive in (lax.conv_general_dilated_p, lax.dot_general_p):
                product = functools.partial(primitive.bind, **parameters)
                results = [PRODUCTS[how](product, *values)]
            else:
                results = primitive.bind(*values, **parameters)
                results = results if primitive.multiple_results else [results]
            known |= dict(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    run = jax.jit(lambda *leaves: evaluate(closed.jaxpr, closed.consts, leaves))
    return jax.tree.unflatten(jax.tree.structure(shape), run(*jax.tree.leaves(arguments)))


def on_gpu() -> contextlib.AbstractContextManager:
    """Trace the forms of a GPU."""
    return mock.patch.object(parallel, "platform", lambda: "gpu")


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


def read(
    name: str,
    variables: PyTree,
    images_BHWC: np.ndarray,
    stem: str,
    dtype: str,
    how: str | None = None,
) -> dict:
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

        by_pixels = jax.grad(energy, has_aux=True)
        if how is None:
            gradient, (logits, layers) = jax.jit(by_pixels)(images_BHWC)
        else:
            with on_gpu():
                gradient, (logits, layers) = emulate(how, by_pixels, images_BHWC)
    found = {"logits": [logits], "gradient": [gradient]}
    found |= {what: [layer[what] for layer in layers] for what in ("mean", "var")}
    return {k: [np.asarray(v, np.float64).ravel() for v in vs] for k, vs in found.items()}


def seen(images_BHWC: np.ndarray, draws: int = 8) -> list[dict]:
    """What the view's products cost the images and the gradient through it, over some views."""
    images_BHWC = np.asarray(images_BHWC, np.float32)
    random = np.random.default_rng(2)
    gradient_BHWC = random.standard_normal(images_BHWC.shape, np.float32)
    grey = 255 * max(pixels.IMAGENET.std)

    def both(view):
        viewed, pull = jax.vjp(lambda x: views.apply_view(x, view), images_BHWC)
        return [viewed, *pull(gradient_BHWC)]

    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), draws)
    size = images_BHWC.shape[1:3]
    drawn = [views.sample_view(key, size, flip=True, roll=32) for key in keys]
    rows = []
    for how in PRODUCTS:
        images, gradients, furthest = [], [], []
        for view in drawn:
            viewed, pulled = both(view)
            with on_gpu():
                image, gradient = emulate(how, both, view)
            images.append(relative(image, viewed))
            gradients.append(relative(gradient, pulled))
            furthest.append(grey * float(np.max(np.abs(image - viewed))))
        row = {"images": max(images), "gradient": max(gradients), "levels": max(furthest)}
        rows.append({"products": how, **row})
    return rows


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
    if "views" in found:
        lines += ["", "The view alone, the worst of eight against float32:", ""]
        lines += ["| products | images | gradient | furthest, grey levels of 255 |"]
        lines += ["|:--|--:|--:|--:|"]
        lines += [
            f"| {r['products']} | {r['images']:.1e} | {r['gradient']:.1e} | {r['levels']:.3f} |"
            for r in found["views"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architectures", default=",".join(POOL))
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="number of images")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--as-it-is", action="store_true", help="emulate nothing: what is here")
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
        emulated = [] if arguments.as_it_is else [("float32", how) for how in PRODUCTS]
        for dtype, how in [*((d, None) for d in DTYPES), *emulated]:
            row = compare(read(name, variables, images, stem, dtype, how), true)
            source = pathlib.Path(files[name]).name if name in files else "drawn"
            found["rows"].append(
                {"architecture": name, "weights": source, "dtype": how or dtype, **row}
            )
            print(table({**found, "rows": found["rows"][-1:]}).splitlines()[-1], flush=True)
    if not arguments.as_it_is:
        found["views"] = seen(images)
    print(table(found))
    measuring.save(found, table(found), arguments.out)


if __name__ == "__main__":
    main()
