"""A run that is killed or stopped at any moment continues to the same bits.

Six kills are among the fast tests: one at start-up and one in every stage, with two stops between
them. The fifty of ``make test-all`` are drawn from a seeded list of events (``helpers/dying.py``).
"""

from __future__ import annotations

import re
import shutil
import signal

import numpy as np
import pytest
from helpers.command import TINY, assert_same, finished, reference, results, run, signal_when
from helpers.dying import EVENTS

__all__ = ["finished", "reference"]  # fixtures

# Checkpoints after every dispatch of recover and after every training step.
OFTEN = ("--config.recover.checkpoint_seconds=0.001", "--config.validate.checkpoint_seconds=0.001")

DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}

# stage -> a path whose appearance says that the stage is in the middle of its work
MOMENTS = {
    "start-up": "config.json",
    "squeeze": "squeeze/second/checkpoints/[3-9]",
    "recover": "recover/checkpoints/*/[369]",
    "relabel": "relabel/fingerprint.json",
    "validate": "validate/outside/0/checkpoints/[3-9]",
    "analyse": "analyse/grid.png",
}
MORE_MOMENTS = {
    "teacher begun": "squeeze/first/fingerprint.json",
    "teacher written": "squeeze/outside/weights.safetensors",
    "recover begun": "recover/fingerprint.json",
    "checkpoint half written": "recover/checkpoints/*/*tmp*",
    "unit half written": "recover/images/00001/00000.png",
    "unit done": "recover/units/g00001_b00000.json",
    "all units done": "recover/units/g00001_b00001.json",
    "images done": "recover/manifest.json",
    "labels written": "relabel/labels-00000.array_record",
    "control's labels": "controls/random_real/relabel/fingerprint.json",
    "student begun": "validate/outside/0/fingerprint.json",
    "student done": "validate/outside/0/record.json",
    "control's student": "controls/full_real/validate/outside/0/checkpoints/[3-9]",
    "summary": "analyse/fingerprint.json",
    "page written": "report.html",
}


def appears(root, pattern):
    """Whether a path is there that was not: a run that begins must have set its signals."""
    before = set(root.glob(pattern))
    return lambda: not before.issuperset(root.glob(pattern))


def stop(root, pattern, signum, status, command, **devices) -> str:
    """Ask a run to stop as soon as a path is there: it saves, and says how to continue."""
    stopped = signal_when(appears(root, pattern), signum, *command, **devices)
    assert stopped.returncode == status
    assert stopped.stderr.strip().splitlines()[-1] == (
        f"stopped by {signum.name}; everything so far is saved in {root}. "
        f"Run the same command again to continue."
    )
    assert not (root / ".lock").exists()
    return stopped.stdout


# before the kill in a stage: another moment, at which the run is asked to stop
STOPPED_BEFORE = {
    "squeeze": ("squeeze/first/checkpoints/[3-9]", signal.SIGINT, 130),
    "relabel": ("recover/units/*.json", signal.SIGTERM, 143),  # the last unit is not begun yet
}


def test_killed_in_stage_after_stage(tmp_path, reference):
    """In every stage; and stopped in two of them, between the kills."""
    root, command = tmp_path / "run", (TINY, f"--workdir={tmp_path / 'run'}", *OFTEN)
    said, devices = "", {}
    for stage, pattern in MOMENTS.items():
        if stage in STOPPED_BEFORE:
            said += stop(root, *STOPPED_BEFORE[stage], command, **devices)
        killed = signal_when(appears(root, pattern), signal.SIGKILL, *command, **devices)
        assert killed.returncode == -signal.SIGKILL, stage
        assert not (root / "summary.json").exists(), stage
        said += killed.stdout
        # What one device began, three devices end.
        devices = DEVICES if stage == "recover" else {}
    done = run(*command)
    assert done.returncode == 0, done.stderr
    said += done.stdout
    # The checkpoints were used: a run that begins anew does not say so.
    assert re.search(r"squeeze second: continues after step \d+ of 12", said)
    assert re.search(r"recover: unit \w+ continues after iteration [369]\n", said)
    assert re.search(r"validate synthetic/outside/0: continues after step \d+ of 12", said)
    assert_same(root, reference)


STOPS = [("squeeze", signal.SIGINT, 130), ("recover", signal.SIGTERM, 143)]
MORE_STOPS = [("relabel", signal.SIGTERM, 143), ("validate", signal.SIGINT, 130)]


@pytest.mark.slow
@pytest.mark.parametrize("stops", [STOPS, MORE_STOPS])
def test_stopped_where_it_was_killed(tmp_path, reference, stops):
    root, command = tmp_path / "run", (TINY, f"--workdir={tmp_path / 'run'}", *OFTEN)
    for stage, signum, status in stops:
        stop(root, {**MOMENTS, **MORE_MOMENTS}[stage], signum, status, command)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert_same(root, reference)


@pytest.mark.slow
@pytest.mark.parametrize("moment", {**MOMENTS, **MORE_MOMENTS})
def test_killed_once(tmp_path, reference, moment):
    root, command = tmp_path / "run", (TINY, f"--workdir={tmp_path / 'run'}", *OFTEN)
    pattern = {**MOMENTS, **MORE_MOMENTS}[moment]
    killed = signal_when(appears(root, pattern), signal.SIGKILL, *command)
    assert killed.returncode == -signal.SIGKILL
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert_same(root, reference)


DYING = ("tests/helpers/dying.py",)
KILLS_PER_RUN = 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_five_times_at_drawn_events(tmp_path, reference, seed):
    """Fifty kills in all; which event and which of its occurrences is drawn by the seed."""
    root, command = tmp_path / "run", (TINY, f"--workdir={tmp_path / 'run'}", *OFTEN)
    random = np.random.default_rng(seed)
    names = list(EVENTS)
    kills: list[str] = []
    while len(kills) < KILLS_PER_RUN:
        # The first ten events come first once each; the others are drawn.
        name = names[seed % len(names)] if not kills else str(random.choice(names))
        number = int(random.integers(1, 9))
        done = run(name, str(number), *command, command=DYING)
        if done.returncode == 0:  # it happened less often than that
            assert_same(root, reference)
            shutil.rmtree(root)
            continue
        assert done.returncode == -signal.SIGKILL, f"{kills} {name} {number}: {done.stderr}"
        kills.append(f"{name} {number}")
    done = run(*command)
    assert done.returncode == 0, f"{kills}: {done.stderr}"
    assert_same(root, reference)


@pytest.mark.slow
def test_killed_while_labels_are_made_online(tmp_path, reference):
    root = tmp_path / "run"
    command = (TINY, f"--workdir={root}", "--config.relabel.mode=online", *OFTEN)
    for pattern in (MOMENTS["validate"], MORE_MOMENTS["control's student"]):
        killed = signal_when(appears(root, pattern), signal.SIGKILL, *command)
        assert killed.returncode == -signal.SIGKILL
    done = run(*command)
    assert done.returncode == 0, done.stderr
    ours, theirs = results(root), results(reference)
    assert {k: v for k, v in theirs.items() if not k.endswith("relabel")} == ours
    assert any(k.endswith("relabel") for k in theirs)


@pytest.mark.slow
def test_another_thread_pool_is_warned_of(finished):
    """The twin of the promise: other bits may follow, and the run says so."""
    (finished / "report.html").unlink()
    done = run(TINY, f"--workdir={finished}", NPROC="1")
    assert done.returncode == 0, done.stderr
    assert "NPROC=8 and goes on with NPROC=1" in done.stdout
