"""Every preset and method config, resolved, is the text that was reviewed."""

from __future__ import annotations

import pytest
from config.make_golden import FOLDER, configs, text

AGAIN = "where that is meant, `make golden` writes the texts anew; read their difference"


@pytest.mark.parametrize("name", configs())
def test_a_resolved_config_is_the_reviewed_text(name):
    path = FOLDER / f"{name}.txt"
    assert path.exists(), f"{path.name} is missing: {AGAIN}"
    was, now = path.read_text().splitlines(), text(*configs()[name]).splitlines()
    changed = sorted(set(was) ^ set(now))
    assert not changed, f"{name} resolves to other values: {AGAIN}\n" + "\n".join(changed)


def test_no_text_is_left_of_a_config_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(configs())


def test_a_changed_default_is_seen(monkeypatch):
    from configs import base

    original = base.get_config

    def other(arg: str = ""):
        c = original(arg)
        c.recover.alpha_bn = 0.02
        return c

    monkeypatch.setattr(base, "get_config", other)
    with pytest.raises(AssertionError, match="recover.alpha_bn = 0.02"):
        test_a_resolved_config_is_the_reviewed_text("digits_ipc10")
