"""Every network of the second engine against diffusers and transformers, from their directories.

The golden files hold what those computed; where they are installed, they are checked too.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from diffusion import our_networks, parity

from prism_jax.diffusion import dit, huggingface
from prism_jax.models import layers


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_networks_match_the_published_ones(case, tmp_path):
    golden = parity.write(case, tmp_path / case.name)
    assert parity.compare(our_networks.outputs(case, tmp_path / case.name), golden) == []


# --- the twins: one operation is another, and the comparison sees it --------------------------

NORMALISE = layers.normalise


def other_epsilon(x, axes, epsilon):
    return NORMALISE(x, axes, 10 * epsilon)


# (case, what is replaced, by what)
TWINS = [
    ("dit", (dit, "gelu"), jax.nn.relu),
    ("dit", (dit, "gelu"), lambda x: jax.nn.gelu(x, approximate=False)),
    ("dit", (layers, "normalise"), other_epsilon),
    ("dit", (our_networks, "FORMS"), {"dit": {"frequency_shift": 0}}),
    ("dit", (our_networks, "FORMS"), {"dit": {"mlp_epsilon": 1e-6}}),
    ("dit_released", (our_networks, "FORMS"), {}),
]


@pytest.mark.parametrize("name, where, twin", TWINS)
def test_another_operation_is_seen(name, where, twin, tmp_path, monkeypatch):
    case = parity.BY_NAME[name]
    golden = parity.write(case, tmp_path / name)
    monkeypatch.setattr(*where, twin)
    assert set(parity.compare(our_networks.outputs(case, tmp_path / name), golden)) == set(golden)


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_golden_files_are_what_the_published_code_says(case, tmp_path):
    reason = "needs torch, diffusers and transformers; the golden files stand for them"
    torch_networks = pytest.importorskip(
        "diffusion.torch_networks", reason=reason, exc_type=ImportError
    )
    golden = parity.write(case, tmp_path / "golden")
    found = torch_networks.outputs(case, tmp_path / "live")
    assert parity.compare(found, golden) == []
    ours, theirs = (
        huggingface.load(str(tmp_path / name), case.part) for name in ("golden", "live")
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, theirs.params))
    assert ours.module == theirs.module
