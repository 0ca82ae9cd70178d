"""What a run needs to know of its machine, before and beside the work.

The environment is prepared before JAX is imported: the number of threads decides the bits on a
CPU, and is fixed when the first backend is created.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import math
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from prism_jax import control_groups

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

# parallel.matmul_precision: what the operands of a float32 product become on a GPU and on a TPU.
FLOAT32 = {
    "default": ("TF32", "bfloat16"),
    "high": ("TF32", "bfloat16, three passes"),
    "highest": ("float32", "float32"),
}


def prepare_environment(config: Any, problems: list[str]) -> None:
    """Fix what decides bits and speed, before JAX creates a backend.

    NPROC is the size of XLA's CPU thread pool. Values already in the environment win.
    """
    nproc = os.environ.setdefault("NPROC", "8")
    if not nproc.isdecimal() or int(nproc) == 0:
        problems.append(f"NPROC in the environment is {nproc!r}; it must be a positive number")
    parallel = config.get("parallel") or {}  # what may be unset there is said later
    deterministic = parallel.get("deterministic") is True
    if deterministic and "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # A bucket's listings are kept for ever, and what other processes write is never seen in them.
    os.environ.setdefault("FSSPEC_GCS_USE_LISTINGS_CACHE", "")  # older versions take words for True
    keep_freed_memory()

    import jax

    collect_less()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder(jax.__version__))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if deterministic:
        # What XLA tuned without that flag would be taken over, an algorithm of other bits with it.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    precision = parallel.get("matmul_precision")
    if precision in FLOAT32:
        jax.config.update("jax_default_matmul_precision", precision)
    # A CPU's programs run in the thread that calls them, whose heap keeps their temporaries
    # (``keep_freed_memory``). The heaps of other threads do not, and one heap for all of them is
    # left in pieces by compiling, and contended: steps of 1.6 times the time after a compilation.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> None:
    """Let glibc reuse what is freed.

    By default it returns the temporaries of every training step to the system, which maps and
    zeroes them for the next one: a third of a small network's step (measured). The main thread's
    heap alone keeps pieces of any size, see ``prepare_environment``.
    """
    if libc := _glibc():
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 1 << 30)


def return_freed_memory() -> None:
    """Let glibc give back to the system, once, what is freed."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def collect_less() -> None:
    """Let Python's collector pass over what stays, and come less often.

    Tracing makes many objects that live, and the collector looks at all of them again and again: a
    fifth of the time of a small run whose programs are compiled already (measured).
    """
    gc.freeze()
    gc.set_threshold(10_000)


_ONE_THREAD = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra on the host by one thread, whose number decides the order of its sums.

    The limit is the process': who comes while another has it waits.
    """
    from threadpoolctl import threadpool_limits

    with _ONE_THREAD, threadpool_limits(1):
        yield


def cores() -> int:
    """The processor's cores that this process may use, and is given time on."""
    there = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        there = len(os.sched_getaffinity(0))
    return max(1, min([there, *map(math.ceil, control_groups.cores())]))


def memory() -> int | None:
    """Bytes of memory that this process may have: the machine's, or its group's; None: unknown."""
    if not hasattr(os, "sysconf"):
        return None
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *(limit for limit, _ in control_groups.memory())])


def free_memory() -> int:
    """Bytes of memory that new work can have; half of all where nobody says."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        there = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):  # no Linux
        return (memory() or 0) // 2
    return max(0, min([there, *(limit - used for limit, used in control_groups.memory())]))


def used_memory() -> float:
    """The share of its memory that this process holds; 0 where nobody says."""
    try:
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux
        return 0.0
    return resident * os.sysconf("SC_PAGE_SIZE") / (memory() or math.inf)


class EarlyInterrupt:
    """Handles Ctrl-C until there is work to save: raises KeyboardInterrupt, and remembers that.

    What is raised while JAX's callback collects garbage is printed and lost.
    """

    came = False

    def __call__(self, signum: int, frame: Any) -> NoReturn:
        self.came = True
        raise KeyboardInterrupt


def raise_early_interrupt() -> None:
    """Raise the KeyboardInterrupt that came and was lost, if one was."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, EarlyInterrupt) and handler.came:
        raise KeyboardInterrupt


def cache_folder(jax_version: str) -> pathlib.Path:
    """Where compiled programs are kept: per JAX version and processor type."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "prism_jax" / f"jax-{jax_version}-{platform.machine()}"


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """What made the results: commit, versions, machine."""
    import flax
    import jax
    import numpy
    import optax

    import prism_jax

    versions = {
        "prism_jax": prism_jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        **{m.__name__.split(".")[0]: m.__version__ for m in (jax, flax, optax, numpy)},
        "orbax": importlib.metadata.version("orbax-checkpoint"),  # importing it takes half a second
    }
    devices = jax.local_devices()
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # made at run time
    machine = {
        "platform": devices[0].platform,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "runtime": " ".join(devices[0].client.platform_version.split()),
        "float32": float32_of(devices[0].platform, precision),
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "nproc": int(os.environ["NPROC"]),
        "system": f"{platform.system()} {platform.machine()}",
    }
    stats = devices[0].memory_stats() or {}  # None on a CPU
    return {
        "commit": commit(),
        "command": "python -m prism_jax.main " + shlex.join(argv),
        "versions": versions,
        "machine": machine,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def float32_of(platform: str, precision: str | None) -> str:
    """What the operands of a float32 product are rounded to there."""
    on_gpu, on_tpu = FLOAT32[precision or "default"]
    return {"cpu": "float32", "tpu": on_tpu}.get(platform, on_gpu)


def commit() -> str | None:
    """The checkout's commit, with "+" where it has changes; None outside a checkout."""
    here = pathlib.Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Below a folder of somebody else's repository the package belongs to none.
    if git("ls-files", "--error-unmatch", "prism_jax/environment.py") is None:
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    if head and git("status", "--porcelain", "--untracked-files=no"):
        head += "+"
    return head or None
