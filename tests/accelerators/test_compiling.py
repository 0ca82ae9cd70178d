"""What a compiler may do to the process it runs in, seen without a compiler.

The process at the other end is the real one; what it runs first plays the compiler.
"""

from __future__ import annotations

import os
import time

import pytest
from helpers import command
from helpers.accelerators import experiment

from prism_jax.accelerators import compiling, targets
from prism_jax.errors import UserError

MADE = experiment(["convnet_d1_bn"], side=16)
H100 = targets.parse("h100")

ABORT = """
import os, sys
print("F1128 10:00:00.123456    1234 tiling.cc:627] Check failed: size == dim (784 vs. 56)",
      file=sys.stderr)
print("*** Check failure stack trace: ***\\n    @     0x7f4617a623f1  xla::Tile()", file=sys.stderr)
sys.stderr.flush()
os.abort()
"""
HANG = """
import sys, time
print("still at it", file=sys.stderr, flush=True)
time.sleep(600)
"""


def compile_with(monkeypatch, prelude: str, **given):
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    return compiling.compile_program(MADE, H100, "recover", prelude=prelude, **given)


def test_an_abort_is_told_with_the_check_that_failed(monkeypatch):
    found = compile_with(monkeypatch, ABORT)
    assert found.outcome == compiling.ABORTED
    assert found.line == "SIGABRT: tiling.cc:627] Check failed: size == dim (784 vs. 56)"
    assert found.cost is None


def test_a_hang_ends(monkeypatch):
    found = compile_with(monkeypatch, HANG, timeout=12)
    assert found.outcome == compiling.HUNG
    assert "no end after 12 s" in found.line and "still at it" in found.line


def test_no_compiler_outlives_who_asked(tmp_path):
    """Killed, who asked cannot end it, and the next would share the machine with it for minutes."""
    said = tmp_path / "pid"
    prelude = f"import os, pathlib; pathlib.Path({str(said)!r}).write_text(str(os.getpid()))" + HANG
    asker = (
        "from helpers.accelerators import experiment\n"
        "from prism_jax.accelerators import compiling, targets\n"
        "targets.compiler_missing = lambda target: None\n"
        "made = experiment(['convnet_d1_bn'], side=16)\n"
        f"compiling.compile_program(made, targets.parse('h100'), 'recover', prelude={prelude!r})"
    )
    process = command.start(command=("-c", asker), PYTHONPATH=str(command.ROOT / "tests"))
    assert within(60, lambda: said.exists() and said.read_text())
    pid = int(said.read_text())
    os.kill(pid, 0)  # it is there
    process.kill()
    process.communicate()
    assert within(20, lambda: not is_there(pid))


def within(seconds: float, found) -> bool:
    """Whether something comes true before so long."""
    end = time.monotonic() + seconds
    while not (true := found()) and time.monotonic() < end:
        time.sleep(0.2)
    return bool(true)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_another_end_is_a_failure_with_its_last_line(monkeypatch):
    found = compile_with(monkeypatch, "raise RuntimeError('what is this?')")
    assert (found.outcome, found.line) == (compiling.FAILED, "RuntimeError: what is this?")


@pytest.mark.parametrize(
    ("said", "outcome", "needed"),
    [
        ("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot", "not without a device",
         None),
        ("INTERNAL: Failed to get configs for: 6 out of 28 instructions. - INVALID_ARGUMENT: "
         "CublasLtBackend cannot enumerate configs in deviceless mode.", "not without a device",
         None),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. "
         "Exceeded hbm capacity by 4.75G.", "out of memory", int(20.5 * (1 << 30))),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (2.50T) exceeds available HBM (15.75G).", "out of memory",
         int(2.5 * (1 << 40))),
        ("UNIMPLEMENTED: no such instruction", "failed", None),
    ],
)  # fmt: skip
def test_refusals_are_told_apart(said, outcome, needed):
    found = compiling._refused(f"\n{said}\nmore of it")
    assert (found["outcome"], found.get("needed_bytes")) == (outcome, needed)
    assert found["line"] == said


def test_a_missing_compiler_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(targets, "compiler_missing", lambda target: "install it")
    monkeypatch.setattr(compiling.subprocess, "Popen", None)
    with pytest.raises(UserError, match="install it"):
        compiling.compile_program(MADE, H100, "recover")


def test_a_run_s_flags_are_the_command_line_s(monkeypatch):
    from prism_jax import environment

    for deterministic in (True, False):
        made = experiment(["convnet_d1_bn"], side=16, parallel__deterministic=deterministic)
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        updates: dict = {}
        monkeypatch.setattr("jax.config.update", updates.__setitem__)
        environment.prepare_environment({"parallel": {"deterministic": deterministic}}, [])
        assert compiling.os.environ.get("XLA_FLAGS", "") == compiling.flags_of(made)
        # What was tuned by trying is not taken over.
        assert (updates.get("jax_persistent_cache_enable_xla_caches") == "none") == deterministic
