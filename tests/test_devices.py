"""JAX without the devices that it is asked for."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from helpers.command import ROOT, TINY, run

from configs import tiny
from prism_jax import compare, parallel, pipeline
from prism_jax.config import resolve
from prism_jax.errors import UserError
from prism_jax.stages.context import Context
from prism_jax.tools.teachers import __main__ as teachers


def refuse(error):
    def local_devices():
        raise error

    return local_devices


@pytest.mark.parametrize("field", ["train_devices", "recover_devices"])
def test_chips_that_share_on_a_slice_of_several_hosts_are_warned_of(
    monkeypatch, capsys, tmp_path, field
):
    """That compiler may end the run at its first program, after squeeze."""
    made = resolve(tiny.get_config())
    shared = dataclasses.replace(made.parallel, **{"train_devices": None, field: 4})
    context = Context(dataclasses.replace(made, parallel=shared), tmp_path)
    monkeypatch.setattr(parallel, "local_devices", lambda: 4)
    pipeline.check(context)
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(parallel, "sharing_devices", lambda: 1)
    pipeline.check(context)
    said = f"warning: parallel.{field} is 4, and on a TPU slice of several hosts the compiler may"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ("cuda", AssertionError(), ["JAX_PLATFORMS=cuda: it sees none", "[cuda13]", "[cuda12]"]),
        ("gpu", AssertionError(), ["[cuda13]"]),
        ("tpu", RuntimeError("no libtpu.so\nand more"), ["no libtpu.so", "[tpu]"]),
        ("cdua", RuntimeError("known backends: ['cpu']"), ["=cdua: known backends: ['cpu']"]),
        ("tpu,cuda", RuntimeError("x"), ["[tpu]", "[cuda13]"]),
    ],
)
def test_one_message_says_what_jax_said_and_what_to_do(monkeypatch, wanted, error, said):
    monkeypatch.setattr(jax, "local_devices", refuse(error))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", wanted)
    try:
        with pytest.raises(UserError) as found:
            parallel.find_devices()
    finally:
        jax.config.update("jax_platforms", before)
    text = str(found.value)
    assert [
        part for part in [*said, "unset JAX_PLATFORMS", "JAX_PLATFORMS=cpu"] if part not in text
    ] == []
    assert "and more" not in text


def test_where_nothing_is_asked_for_nothing_is_to_be_unset(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", refuse(RuntimeError("broken")))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(UserError, match="JAX finds no device: broken") as found:
            parallel.find_devices()
    finally:
        jax.config.update("jax_platforms", before)
    assert "unset" not in str(found.value)


@pytest.mark.parametrize("flags", [(), ("--plan",)])
def test_the_real_command_on_a_misspelt_platform(tmp_path, flags):
    done = run(TINY, f"--workdir={tmp_path / 'run'}", *flags, JAX_PLATFORMS="cdua")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: JAX finds no device for JAX_PLATFORMS=cdua: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_the_other_commands_say_it_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jax, "local_devices", refuse(AssertionError()))
    assert teachers.main(["import", str(tmp_path), "--architecture=resnet20"]) == 2
    assert "JAX finds no device" in capsys.readouterr().err
    assert teachers.main(["list", "--names"]) == 0
    assert compare.main([f"--config={ROOT}/configs/compare/digits.py", "--plan"]) == 2
    assert "JAX finds no device" in capsys.readouterr().err
