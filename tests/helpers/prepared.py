"""Small sets prepared by TensorFlow Datasets' own writer, without TensorFlow."""

from __future__ import annotations

import io

import tensorflow_datasets as tfds
from etils import epath

from helpers.images import encoded, random_pixels


def prepare(data_dir, name="Cifar10", version="3.0.2", *, extra=(), counts=None, classes=10):
    """Prepare a set of random images by TFDS's own writer; returns its folder."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=classes),
            **dict(extra),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {s: self.examples(n) for s, n in (counts or {"train": 12, "test": 4}).items()}

    def examples(self, count):
        for i in range(count):
            # As a file: encoding an array would take TensorFlow.
            image = io.BytesIO(encoded(random_pixels(32, 32, 3, seed=i)))
            yield i, {"image": image, "label": i % classes, **{key: 5 for key in dict(extra)}}

    def _generate_examples(self):
        raise NotImplementedError

    body = {f.__name__: f for f in (_info, _split_generators, examples, _generate_examples)}
    body["VERSION"] = tfds.core.Version(version)
    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), body)(
            data_dir=data_dir, file_format="array_record"
        )
    builder.download_and_prepare()
    return epath.Path(builder.data_path)
