"""An experiment as a working directory of any version has it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from configs.digits import config as digits
from prism_jax.config import resolve, restore, to_dict
from prism_jax.errors import UserError
from prism_jax.stages.fingerprints import LATER


def test_an_experiment_comes_back_as_it_was():
    experiment = resolve(digits(10))
    written = json.loads(json.dumps(to_dict(experiment)))
    assert restore(written, LATER) == experiment


def test_what_an_older_version_had_not_is_what_it_was_without():
    experiment = resolve(digits(10))
    old = to_dict(experiment)
    del old["generate"], old["relabel"]["order"]
    for name in ("maker", "keep_at", "clip", "parametrisation", "targets", "inject_from"):
        del old["recover"][name]
    for network in old["networks"].values():
        del network["weights_key"]
    found = restore(old, LATER)
    assert found.recover == experiment.recover and found.relabel == experiment.relabel
    assert found.networks == experiment.networks
    assert found == dataclasses.replace(experiment, generate=found.generate)
    # The twin: without what absence means, a maker would be a first word that happens to fit.
    assert restore(old, {"recover": {"maker": "generate"}}).recover.maker == "generate"


def test_what_a_newer_version_has_is_refused():
    fields = to_dict(resolve(digits(10)))
    fields["recover"]["wisdom"] = 3
    with pytest.raises(UserError, match="another version[^\n]*\n.*recover.wisdom is no field"):
        restore(fields, LATER)
