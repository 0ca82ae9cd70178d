"""Training images for teachers of a part of CIFAR-10: all of a larger, lossy copy, and that part.

    python benchmarks/cifar10_copies.py PART.npz COPY.npz OUT.npz

PART.npz has pixels as published, and ``train_official_index`` beside them; COPY.npz has all
official images in order, as JPEG. OUT.npz has every training image, as published where PART has it:
these come REPEATS times, so that a third of what a teacher sees is not the lossy copy's. What
``dataset.held_out`` holds out of PART is in neither form. The test images are PART's.
"""

from __future__ import annotations

import argparse

import numpy as np

from prism_jax.data.sources import open_source, read_all
from prism_jax.stages.inputs import held_out

REPEATS = 3
HELD_OUT, SEED = 0.1, 0  # dataset.held_out, dataset.held_out_seed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("part", "copy", "out"):
        parser.add_argument(name)
    a = parser.parse_args()

    def opened(path: str, split: str):
        return open_source(name="cifar10", source="npz", path=path, split=split, image_size=32)

    part, index_N = opened(a.part, "train"), np.load(a.part)["train_official_index"]
    images_NHWC, labels_N = read_all(opened(a.copy, "train"))
    images_NHWC[index_N], own_labels = read_all(part)
    if not np.array_equal(labels_N[index_N], own_labels):
        raise SystemExit(f"{a.copy} does not hold the official images in order")
    kept, out = held_out(part, HELD_OUT, SEED)
    rest = np.setdiff1d(np.arange(len(labels_N)), index_N)
    at_N = np.concatenate([rest, *[index_N[kept.at_M]] * REPEATS])
    assert not np.isin(index_N[out.at_M], at_N).any()
    test_images, test_labels = read_all(opened(a.part, "test"))
    np.savez(
        a.out, train_images=images_NHWC[at_N], train_labels=labels_N[at_N],
        test_images=test_images, test_labels=test_labels,
    )  # fmt: skip
    print(
        f"{a.out}: {len(at_N)} images for training, {len(out)} held out, {len(test_labels)} tests"
    )


if __name__ == "__main__":
    main()
