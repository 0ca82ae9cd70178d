"""Your own arrays and your own network, distilled by five calls: no config, no workdir.

python examples/own_data_own_teacher.py
"""

import os

os.environ.setdefault("NPROC", "8")  # on a CPU the bits depend on it; before JAX starts

import flax.linen as nn
import numpy as np
from sklearn.datasets import load_digits

import prism_jax
from prism_jax.models import layers
from prism_jax.training import test


class MyTeacher(nn.Module):
    """Any flax.linen module will do whose BatchNorms and convolutions are prism_jax's layers."""

    features: int
    num_classes: int = 10

    @nn.compact
    def __call__(self, images_BHWC, train: bool = False):
        x = images_BHWC
        for i in range(2):
            x = layers.Conv(self.features, 3, padding=1, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(layers.BatchNorm(name=f"bn{i}")(x, train))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def main(iterations: int = 200, epochs: int = 10) -> tuple[np.ndarray, list, float]:
    digits = load_digits()
    images = (digits.images[..., None] * 15.9).astype(np.uint8)  # uint8 (N, H, W, C)
    labels = digits.target.astype(np.int32)
    space = prism_jax.Normalisation(mean=(0.3,), std=(0.37,))
    shape = images.shape[1:]

    members = {}
    for name, features in {"wide": 32, "narrow": 16}.items():
        net = MyTeacher(features)
        kwargs = dict(epochs=epochs, learning_rate=1e-2, crop_min=0.6, flip=False)
        members[name] = net, prism_jax.fit(net, images, labels, normalisation=space, **kwargs)
    pool = prism_jax.TeacherPool.of(members, image_shape=shape, normalisation=space)

    first = np.array([np.flatnonzero(labels == c)[0] for c in range(10)])
    synthetic = prism_jax.synthesise(
        pool, images[first], labels[first], iterations=iterations, flip=False, roll=1
    )
    soft = prism_jax.relabel(pool.select(["wide"]), synthetic, epochs=100, flip=False)

    # A student of ten images; the soft labels know the views that they were made of.
    net = MyTeacher(32)
    kwargs = dict(
        soft_labels=soft, epochs=50 * epochs, learning_rate=1e-2, loss="kl", temperature=4.0
    )
    student = prism_jax.fit(net, synthetic, labels[first], normalisation=space, **kwargs)
    return synthetic, soft, test(net, student, images, labels, space).top1


if __name__ == "__main__":
    images, records, top1 = main()
    print(f"{len(images)} synthetic images, {len(records)} batches of soft labels")
    print(f"a student of them is right on {top1:.1%} of the real images")
