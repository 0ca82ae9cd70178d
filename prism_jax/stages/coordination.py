"""Working on one directory: its lock, what falls to which process, and the request to stop."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from prism_jax import parallel, progress
from prism_jax.config import Experiment, to_dict
from prism_jax.data import workdir
from prism_jax.environment import raise_early_interrupt
from prism_jax.errors import UserError


class Interrupted(Exception):
    """The run was asked to stop; everything so far is saved.

    Attributes:
      failed: the status of another process that met an error; None: there was none.
      status: the exit status: that, or what the signal's is. Who starts jobs again where they were
        only asked to stop must not do so after an error, nor after one that would come again.
    """

    def __init__(self, signum: int, elsewhere: parallel.Stopped | None = None):
        """``signum``: what asked; ``elsewhere``: what another process ended by."""
        super().__init__(elsewhere.why if elsewhere else signal.Signals(signum).name)
        self.failed = elsewhere.status if elsewhere else None
        self.status = self.failed or 128 + signum


class StopSignal:
    """Turns SIGINT and SIGTERM into a request that the running stage honours after saving.

    Where another process of the run has stopped or failed, this one is asked to stop too: what
    it waits for would never come.
    """

    SECONDS_BETWEEN_QUESTIONS = 2.0

    def __init__(self) -> None:
        self.signum: int | None = None
        self._seen: set[int] = set()
        self._elsewhere: parallel.Stopped | None = None
        self._asked = 0.0

    def install(self) -> None:
        """Catch both signals from now on; one that comes again ends the process at once.

        Each kind counts for itself: Ctrl-C reaches a process and the script that started it, which
        asks with SIGTERM.

        Raises:
          KeyboardInterrupt: one came before.
        """
        raise_early_interrupt()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._request)

    def _request(self, signum: int, frame: Any) -> None:
        if signum in self._seen:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self._seen.add(signum)
        self.signum = self.signum or signum

    @property
    def requested(self) -> bool:
        if self.signum is None:
            now = time.monotonic()
            if now - self._asked >= self.SECONDS_BETWEEN_QUESTIONS:
                self._asked, self._elsewhere = now, parallel.stopped_elsewhere()
        return self.signum is not None or self._elsewhere is not None

    def check(self) -> None:
        """Raise ``Interrupted`` where a stop was requested; call it only when all is saved."""
        if self.requested:
            raise Interrupted(self.signum or signal.SIGTERM, self._elsewhere)


# Of what began a workdir: the words before its value, and what comes of another.
DECIDE_BITS = {
    "nproc": ("NPROC=", "on a CPU other bits will follow"),
    "platform": ("", "other bits will follow"),
    "device_kind": ("", "other bits will follow"),
    "float32": ("float32 as ", "other bits will follow"),
    "runtime": ("", "other bits may follow"),
    "jax": ("jax ", "other bits may follow"),
    "jaxlib": ("jaxlib ", "other bits may follow"),
}


class Work:
    """The work on one directory, shared by the processes of a run.

    The main process holds the lock, for all of them, and says who does what.
    """

    SECONDS_UNTIL_SEEN = 120.0  # a network's file system shows a new file a minute later

    def __init__(
        self,
        root: epath.Path,
        config: Experiment,
        stop: StopSignal,
        provenance: Mapping[str, Any],
    ):
        """Write nothing yet; see ``Context`` for the arguments."""
        self.lock = workdir.Lock(root, stop.check)
        self._root, self._config, self._stop = root, config, stop
        self._provenance = provenance
        self._common = False

    def acquire(self) -> None:
        """Take the workdir's lock before the first write, and record what runs: config.json.

        Of several processes the main one does, for all of them: see ``deal``.
        """
        if self.lock.held or not parallel.is_main():
            return
        self.lock.acquire()
        path = self._root / "config.json"
        found = workdir.read_json(path) if path.exists() else None
        if found and found["experiment"] != to_dict(self._config):
            self._outdate()
        if found and self._provenance:
            before, now = (
                {**of.get("versions", {}), **of.get("machine", {})}
                for of in (found["provenance"], self._provenance)
            )
            for key, (words, follow) in DECIDE_BITS.items():
                was, on = before.get(key), now.get(key)
                if was not in (None, on):
                    progress.say(
                        f"warning: this workdir was begun with {words}{was} and goes on with "
                        f"{words}{on}; {follow}."
                    )
        workdir.write_record(
            path, {"experiment": to_dict(self._config), "provenance": self._provenance}
        )

    def begin(self, folder: epath.Path, fields: dict[str, Any]) -> None:
        """Take the workdir's lock and record what a folder is about to be made from.

        What was made there from other settings is deleted (squeeze and recover refuse before it
        comes to that); what does not say what it was made from is set aside.
        """
        self.acquire()
        found = workdir.read_fingerprint(folder)
        if found is not None:
            if not workdir.differences(found, fields):
                return
            progress.say(f"{folder} was made from other settings; it is made again")
            self._outdate()
            workdir.remove(folder)
        elif folder.exists() and (workdir.names(folder) or not folder.is_dir()):
            aside = workdir.set_aside(folder)
            progress.say(
                f"warning: {folder} has no {workdir.FINGERPRINT}; it is set aside as {aside}"
            )
        workdir.write_fingerprint(folder, fields)

    def _outdate(self) -> None:
        """Remove the summary of other settings: until the run ends, there is none of these."""
        (self._root / workdir.SUMMARY).unlink(missing_ok=True)

    def deal(
        self,
        name: str,
        items: Sequence[Any],
        pending: Callable[[], Sequence[Any]],
        prepare: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """The missing pieces of work that fall to this process.

        A process calls it where a stage begins, unless the others have already done all of it.
        The main process takes the lock, prepares the folders and says what is missing.

        Args:
          name: of the stage and what it is about; used once in a run.
          items: everything the stage makes, in the order it is worked on.
          pending: which of them are missing.
          prepare: what comes before the work; only the main process runs it.

        Raises:
          UserError: this process has another working directory than the main one.
        """
        if parallel.is_main():
            self.acquire()
            prepare()
            left = pending()
            missing = [i for i, item in enumerate(items) if item in left]
            parallel.tell(name, json.dumps([missing, self.lock.token]))
        else:
            while (told := parallel.told(name)) is None:
                self._stop.check()
            missing, token = json.loads(told)
            self._check_common(token)
        return parallel.process_share([items[i] for i in missing])

    def _check_common(self, token: str) -> None:
        """Look once for the main process' lock: work put elsewhere would be waited for for ever."""
        until = time.monotonic() + self.SECONDS_UNTIL_SEEN
        while not (self._common or self.lock.is_of(token)):
            if time.monotonic() > until:
                raise UserError(
                    f"{parallel.name()} on {socket.gethostname()} does not see the lock of process "
                    f"0 in {self._root}: the processes of a run need one --workdir that all see, a "
                    f"common file system or a bucket"
                )
            self._stop.check()
            time.sleep(0.2)
        self._common = True

    def agree(self, what: str, found: Callable[[], str], otherwise: str) -> None:
        """Compare what every process has, before any makes something of it.

        Args:
          what: is compared.
          found: this process has.
          otherwise: the message of a difference says; of {mine} and {told} too.

        Raises:
          UserError: this process has something else than the main one.
        """
        if parallel.process_count() == 1:
            return
        mine, key = found(), f"agreed/{what}"
        if parallel.is_main():
            parallel.tell(key, mine)
            return
        while (told := parallel.told(key)) is None:
            self._stop.check()
        if told != mine:
            raise UserError(
                f"{parallel.name()} on {socket.gethostname()} has other {what} than process 0: "
                f"{otherwise.format(mine=mine, told=told)}"
            )

    def first(self, name: str, work: Callable[[], None]) -> None:
        """Run something on the main process alone, before any process goes on."""
        self.deal(name, (), lambda: (), work)

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until the other processes have written what is missing to the working directory.

        Raises:
          Interrupted: a stop was requested.
        """
        seconds = 0.05
        while not done():
            self._stop.check()
            time.sleep(seconds)
            seconds = min(2 * seconds, 5.0)
