"""The table of machines, and what may be named."""

from __future__ import annotations

import importlib.util

import pytest

from prism_jax.accelerators import targets
from prism_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "device", "devices"),
    [
        ("h100", "h100", 1),
        ("h100x8", "h100", 8),
        ("rtx4090", "rtx4090", 1),
        ("rtx4090x2", "rtx4090", 2),
        ("v5e", "v5e", 1),
        ("v5e:4x4", "v5e", 16),
        ("v5e:16x16", "v5e", 256),
        ("v5p:2x2x1", "v5p", 4),
        ("v4:2x2x1", "v4", 4),
    ],
)
def test_a_machine_by_its_name(name, device, devices):
    found = targets.parse(name)
    assert (found.name, found.device.name, found.devices) == (name, device, devices)


@pytest.mark.parametrize(
    ("name", "hosts", "of_a_host"),
    [("h100x8", 1, 8), ("h100x16", 2, 8), ("v5e", 1, 1), ("v5e:2x2", 1, 4), ("v5e:2x4", 1, 8),
     ("v6e:2x4", 1, 8), ("v5e:4x4", 4, 4), ("v4:2x2x2", 2, 4), ("v5p:2x2x1", 1, 4)],
)  # fmt: skip
def test_the_hosts_of_a_machine(name, hosts, of_a_host):
    found = targets.parse(name)
    assert (found.hosts, found.devices_of_a_host) == (hosts, of_a_host)


@pytest.mark.parametrize("name", ["", "h300", "h100x0", "h100:2", "v5ex4", "v9:2x2", "x8", "H100 "])
def test_others_are_refused_with_those_there_are(name):
    with pytest.raises(UserError) as caught:
        targets.parse(name)
    said = str(caught.value)
    assert name in said and all(device in said for device in targets.DEVICES)


@pytest.mark.parametrize("name", ["v5e:4", "v5e:2x2x1", "v5p:2x2", "v6e:0x2"])
def test_a_slice_has_as_many_numbers_as_its_kind(name):
    with pytest.raises(UserError, match=f"has {targets.parse(name[:3]).device.dimensions} pos"):
        targets.parse(name)


def test_rates_are_in_the_order_of_nature():
    for device in targets.DEVICES.values():
        assert 1e9 < device.memory_bytes and 1e11 < device.bytes_per_second < 1e13
        if device.platform == "cuda":
            rates = [device.flops[k] for k in ("bfloat16", "tensorfloat32", "float32")]
            assert rates == sorted(rates, reverse=True) and device.clock_hz is None
        else:
            # What its matrix units do in a cycle is a number of 128 x 128 arrays.
            arrays = device.flops["bfloat16"] / device.clock_hz / (2 * 128 * 128)
            assert arrays == pytest.approx(round(arrays), rel=0.02)


def test_a_missing_compiler_is_one_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("h100", "v5e"):
        said = targets.compiler_missing(targets.parse(name))
        assert said.count("pip install") == 1 and "jax[" in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert targets.compiler_missing(targets.parse("h100")) is None
