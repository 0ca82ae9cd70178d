"""A plausible finished run for the tests of what a person reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from prism_jax.analysis import summary as summaries


def student(*top1: float) -> dict[str, Any]:
    fields = {"top5": 0.99, "seconds": 12.0}
    return summaries.over_seeds(
        [{"top1": x, "best_top1": x + 0.01, "per_class": [x, 0.5], **fields} for x in top1]
    )


SUMMARY: dict[str, Any] = {
    "schema": 1,
    "config": "digits_ipc10",
    "preset": "prism",
    "method": "prism",
    "command": "python -m prism_jax.main --config=configs/digits_ipc10.py",
    "seeds": [0, 1, 2],
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "precision": {"squeeze": "float32", "recover": "float32"},
    "versions": {"jax": "0.10.2", "flax": "0.12.8", "python": "3.11.7"},
    "machine": {"platform": "cpu", "devices": 1, "NPROC": 8, "memory_bytes": None},
    "dataset": {
        "name": "digits", "num_classes": 10, "image_size": 16,
        "train_images": 1437, "test_images": 360,
    },
    "teachers": {
        "resnet18": {"top1": 0.9861, "params": 702_410, "batch_norms": 20, "width": 0.25},
        "mobilenet_v2": {"top1": 0.9722, "params": 151_018, "batch_norms": 18},
        "efficientnet_b0": {"top1": 0.9694, "params": 201_500, "batch_norms": 21},
        "shufflenet_v2_x0_5": {"top1": 0.9583, "params": 58_310, "batch_norms": 25},
    },
    "recover": {
        "images": 100,
        "ipc": 10,
        "seconds": 96.4,
        "seconds_per_image": 0.964,
        "peak_bytes": None,
        "primary": "resnet18",
        "teachers_drawn": {
            "resnet18": 1.0, "mobilenet_v2": 0.5, "efficientnet_b0": 0.4, "shufflenet_v2_x0_5": 0.6,
        },
        "terms": {
            "resnet18": {"start": {"ce": 0.412, "bn": 21.3}, "end": {"ce": 0.00213, "bn": 4.12}},
            "mobilenet_v2": {"start": {"ce": 0.51, "bn": 30.4}, "end": {"ce": 0.035, "bn": 9.7}},
            "efficientnet_b0": {"start": {"ce": 0.6, "bn": 18.9}, "end": {"ce": 0.041, "bn": 7.2}},
            "shufflenet_v2_x0_5": {
                "start": {"ce": 0.71, "bn": 44.1}, "end": {"ce": 0.088, "bn": None},
            },
        },
        "distance_from_initial": 0.2134,
    },
    "relabel": {"bytes": 3_060_000, "seconds": 9.1},
    "protocol": {
        "loss": "mse_gt", "temperature": None, "ce_weight": 0.1, "epochs": 300, "batch_size": 50,
        "bn_group": 25, "optimiser": "adamw", "learning_rate": 0.001, "schedule": "cos2",
        "ema": None,
    },
    "validate": {"resnet18": student(0.93, 0.94, 0.95), "convnet": student(0.90, 0.91, 0.89)},
    "controls": {
        "random_real": {"resnet18": student(0.90, 0.92, 0.91), "convnet": student(0.88, 0.88, 0.9)},
        "random_real_hard": {"resnet18": student(0.82, 0.8, 0.81)},
        "full_real": {"resnet18": student(0.985, 0.983, 0.987), "convnet": {"top1": None}},
    },
    "analyse": {
        "network": "resnet18",
        "intra_class_cosine": {"synthetic": 0.812, "initial": 0.775, "real": 0.768},
    },
}  # fmt: skip


@pytest.fixture
def summary() -> dict[str, Any]:
    """A summary.json of a finished run; a test may change it."""
    return copy.deepcopy(SUMMARY)
