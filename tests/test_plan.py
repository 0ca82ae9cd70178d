"""What a plan says of this machine: arithmetic on what is timed."""

from __future__ import annotations

import importlib

import jax
import pytest

from configs import tiny_d4m
from prism_jax import plan
from prism_jax.config import batch_layout, resolve


def test_the_time_of_an_image_by_hand(monkeypatch):
    """Decoding takes 8 seconds, an evaluation 2: three of six steps, one more of PNDM's."""
    c = tiny_d4m.get_config()
    c.generate.sampler = "pndm"
    e, calls = resolve(c), []
    size = min(e.generate.batch_size, batch_layout(e).size)

    def time(function):
        function()  # it runs
        calls.append(function)
        return 8.0 if len(calls) == 1 else 8.0 + 2.0 * 3

    monkeypatch.setattr(plan, "_time", time)
    found = plan._measured_images(e)
    each, images = (8 + 2 * 4) / size, e.recover.ipc * e.dataset.num_classes
    assert f"{each:.3g} s an image, {8 / size:.2g} s of it decoding" in found["recover takes"]
    hours = images * each / len(jax.local_devices()) / 3600
    assert found["recover takes"].startswith(f"about {plan.hours_of(hours)} on")
    assert "MB a device in recover" in found["memory"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("psm", "8 passes over the real images: difficulty by {0}; group by {0}"),
        ("gvbsm", "4 passes over the real images: conv by {0}"),
        ("prism_plus", "a pass over the real images: features by resnet18"),
        ("prism", None),
    ],
)
def test_passes_over_the_real_images(method, said):
    e = resolve(importlib.import_module(f"configs.methods.{method}").get_config("digits"))
    found = plan._statistics(e).get("statistics")
    assert found == (said and said.format(", ".join(e.recover.pool)))
