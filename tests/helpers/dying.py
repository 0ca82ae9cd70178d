"""The real command, which kills itself at the n-th of some events.

    python tests/helpers/dying.py EVENT N FLAGS...

Events are where a process can leave something half done; SIGKILL leaves no time to tidy up.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable

EVENTS: dict[str, Callable[[Callable[[], None]], None]] = {}


def event(install: Callable) -> Callable:
    EVENTS[install.__name__.replace("_", " ")] = install
    return install


def before(owner, name: str, happen: Callable[[], None]) -> None:
    """Let the event happen before each call of a function."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(*arguments, **named):
        happen()
        return original(*arguments, **named)

    setattr(owner, name, changed)


def after(owner, name: str, happen: Callable[[], None]) -> None:
    """Let the event happen after each call of a function: what it began may go on."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(*arguments, **named):
        found = original(*arguments, **named)
        happen()
        return found

    setattr(owner, name, changed)


def _path():
    from etils import epath

    return type(epath.Path("x"))


@event
def before_a_rename(happen) -> None:
    before(_path(), "replace", happen)


@event
def after_a_rename(happen) -> None:
    after(_path(), "replace", happen)


@event
def in_a_file(happen) -> None:
    """Half of it is written."""
    path = _path()
    whole = path.write_bytes

    def half(self, data):
        whole(self, bytes(data)[: len(data) // 2])
        happen()
        return whole(self, data)

    path.write_bytes = half


@event
def in_a_line_of_metrics(happen) -> None:
    from prism_jax.data.metrics import MetricsWriter

    append = MetricsWriter._append

    def in_halves(self, text):
        append(self, text[: len(text) // 2])
        happen()
        append(self, text[len(text) // 2 :])

    MetricsWriter._append = in_halves


@event
def during_an_asynchronous_save(happen) -> None:
    """In Orbax's thread, when half of the arrays are written."""
    from prism_jax.data import orbax_files

    save = orbax_files.Handler.save

    def in_halves(self, directory, args):
        save(self, directory, args)
        file = directory / orbax_files.FILE
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        happen()
        file.write_bytes(data)

    orbax_files.Handler.save = in_halves


@event
def when_a_save_has_begun(happen) -> None:
    """In the main thread, while Orbax's saves."""
    from prism_jax.data.checkpoints import Checkpoints

    after(Checkpoints, "save", happen)


@event
def before_a_checkpoint_is_deleted(happen) -> None:
    from prism_jax.data.checkpoints import Checkpoints

    before(Checkpoints, "delete", happen)


@event
def in_a_chunk(happen) -> None:
    """The devices are at work."""
    from prism_jax.parallel import LaneMap

    after(LaneMap, "__call__", happen)


@event
def in_a_training_step(happen) -> None:
    from prism_jax.training import Trainer

    after(Trainer, "step", happen)


@event
def between_shards(happen) -> None:
    from prism_jax.data import label_store

    after(label_store, "write_shard", happen)


@event
def before_a_record(happen) -> None:
    """All of a piece of work is there but what makes it done."""
    from prism_jax.data import workdir

    before(workdir, "write_record", happen)


@event
def with_the_lock_just_taken(happen) -> None:
    from prism_jax.data.workdir import Lock

    after(Lock, "_create", happen)


@event
def before_a_folder_is_begun(happen) -> None:
    from prism_jax.data import workdir

    before(workdir, "write_fingerprint", happen)


# --- where images are generated: half of a file is written, all of it, or it is in its place ----

SUBSTAGES = {
    "in latents": "/generate/latents/",
    "in anchors": "/generate/anchors/",
    "in candidates": "/generate/candidates/",
    "in images": "/recover/",
}


def files_of(part: str, happen: Callable[[], None]) -> None:
    path = _path()
    whole, rename = path.write_bytes, path.replace

    def write(self, data):
        if part not in str(self):
            return whole(self, data)
        whole(self, bytes(data)[: len(data) // 2])
        happen()
        return whole(self, data)

    def replace(self, target):
        if part not in str(self):
            return rename(self, target)
        happen()
        found = rename(self, target)
        happen()
        return found

    path.write_bytes, path.replace = write, replace


def main(argv: list[str]) -> int:
    name, number, *flags = argv
    lock, left = threading.Lock(), [int(number)]

    def happen() -> None:
        with lock:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    from prism_jax import main as command

    if name in SUBSTAGES:
        files_of(SUBSTAGES[name], happen)
    else:
        EVENTS[name](happen)
    return command.main(flags)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    sys.exit(main(sys.argv[1:]))
