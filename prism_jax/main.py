"""The command line: flags -> experiment -> stages in order. Nothing scientific happens here.

    python -m prism_jax.main --config=configs/digits_ipc10.py

The environment is prepared before JAX is imported: the number of threads decides the bits on a
CPU, and is fixed when the first backend is created.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from prism_jax.errors import UserError

HELP = """\
prism_jax: dataset distillation in JAX

    python -m prism_jax.main --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] [flags]

Stages, in order; each continues where an earlier run stopped:
    squeeze    get teachers: trained here, or imported from checkpoints
    recover    optimise the pixels of the synthetic images against the teachers
    relabel    soft labels over augmented views
    validate   train students on the synthetic set and on its controls, test on real images
    analyse    diversity, figures, report.html

Flags:
    --config=FILE        the experiment, a file of configs/
    --config.a.b=VALUE   override one field of it
    --workdir=DIR        where everything is written (default: runs/<config name>)
    --from=DIR           adopt every finished stage of another workdir that fits
    --stages=A,B         only these stages
    --plan               print what would be done and what it would cost, then stop
    --help               this text

Examples:
    python -m prism_jax.main --config=configs/digits_ipc10.py
    python -m prism_jax.main --config=configs/digits_sre2l_ipc10.py --from=runs/digits_ipc10
    python -m prism_jax.main --config=configs/imagenet_ipc10.py --plan
    python -m prism_jax.main --config=configs/imagenet_ipc10.py:smoke \\
        --config.dataset.path=/data/imagenet
    python -m prism_jax.main --config=configs/digits_ipc10.py --stages=validate,analyse \\
        --config.validate.seeds="(0, 1, 2)"

Exit status: 0 done, 2 something given cannot be used, 130 or 143 stopped by Ctrl-C or SIGTERM
(everything is saved; the same command continues).
"""

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment", flag_values=_FLAGS)
flags.DEFINE_string("workdir", None, "working directory", flag_values=_FLAGS)
flags.DEFINE_string("from", None, "workdir to adopt from", flag_values=_FLAGS)
flags.DEFINE_list("stages", None, "stages to run", flag_values=_FLAGS)
flags.DEFINE_bool("plan", False, "print the plan and stop", flag_values=_FLAGS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or any(a in ("--help", "-h", "-help") for a in argv):
        print(HELP, end="")
        return 0
    try:
        return _main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(argv: list[str]) -> int:
    config = parse(argv)
    stages = parse_stages(_FLAGS.stages)
    prepare_environment(deterministic=config.parallel.get("deterministic") is True)

    from prism_jax.config import resolve
    from prism_jax.stages.context import Context, Interrupted, StopSignal

    experiment = resolve(config)
    workdir = _FLAGS.workdir or f"runs/{experiment.name}"
    if _FLAGS.plan:
        from prism_jax import plan

        plan.show(experiment, workdir, measure=True)
        return 0
    check_requirements(experiment, workdir, stages)

    stop = StopSignal()
    stop.install()
    context = Context(experiment, workdir, stop=stop)
    try:
        _run(context, stages, argv)
    except Interrupted as interrupted:
        print(
            f"stopped by {interrupted}; everything so far is saved in {workdir}. "
            f"Run the same command again to continue.",
            file=sys.stderr,
        )
        return 128 + interrupted.signum
    finally:
        context.lock.release()
    return 0


def _run(context: Any, stages: Sequence[str], argv: Sequence[str]) -> None:
    from prism_jax import pipeline, progress
    from prism_jax.data import workdir
    from prism_jax.stages import analyse

    pipeline.check(context, stages)
    if source := getattr(_FLAGS, "from"):
        for folder in pipeline.adopt(context, source):
            progress.say(f"adopted {folder} from {source}")
    record = provenance(argv)
    previous = context.root / "config.json"
    if previous.exists():
        before = workdir.read_json(previous)["provenance"]["machine"]["nproc"]
        if before != record["machine"]["nproc"]:
            progress.say(
                f"warning: this workdir was begun with NPROC={before} and goes on with "
                f"NPROC={record['machine']['nproc']}; on a CPU other bits will follow."
            )
    if pipeline.run(context, stages):
        from prism_jax.config import to_dict

        value = {"experiment": to_dict(context.config), "provenance": record}
        workdir.write_json(previous, value)
        analyse.write_summary(context, provenance(argv))
    analyse.show_summary(context)


# --- flags ----------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> Any:
    """Parse the flags into ``_FLAGS`` and return the config.

    Raises:
      UserError: an unknown flag, a missing file, a field that does not exist, a wrong type.
    """
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if path is None:
        if "--config" in argv:
            raise UserError("write --config=FILE, with an equals sign")
        raise UserError("no --config=FILE was given; see --help for examples")
    file = pathlib.Path(path.split(":", 1)[0])
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        close = difflib.get_close_matches(str(file), near, n=3) or near[:12]
        there = f"; there are: {', '.join(close)}" if close else ""
        raise UserError(f"no config file at {file}{there}")
    # A config imports its siblings as `configs.base`, wherever the command is run.
    sys.path.insert(0, str(file.resolve().parent.parent))
    _FLAGS.unparse_flags()
    try:
        rest = _FLAGS(["prism_jax", *argv])[1:]
    except UserError:
        raise
    except Exception as error:  # absl and ml_collections raise many kinds
        raise UserError(_explain(argv, error)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; flags start with --, see --help")
    return _CONFIG.value


def _explain(argv: Sequence[str], error: Exception) -> str:
    """What a person should know of a parsing error."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, flags.UnrecognizedFlagError):
        known = ("config", "workdir", "from", "stages", "plan", "help")
        near = difflib.get_close_matches(error.flagname, known, n=1)
        meant = f"; did you mean --{near[0]}?" if near else ""
        return f"unknown flag --{error.flagname}{meant}; allowed: --{', --'.join(known)}"
    for argument in argv:
        name, _, value = argument.partition("=")
        if not name.startswith("--config."):
            continue
        field = name.removeprefix("--config.")
        if problem := _field_problem(argv, field):
            return problem
        if field in first or f"'{value}'" in first or value in first:
            return f"{name} cannot be {value!r}: {first}"
    return f"the flags cannot be used: {first}"


def _field_problem(argv: Sequence[str], field: str) -> str | None:
    """Whether an overridden field exists; where not, the nearest one that does."""
    config_argument = next(a for a in argv if a.startswith("--config="))
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    try:
        values(["prism_jax", config_argument])
        found = holder.value
    except Exception as error:
        return f"{config_argument} cannot be loaded: {str(error).strip().splitlines()[0]}"
    known = _fields(found)
    if field in known:
        return None
    near = difflib.get_close_matches(field, known, n=3)
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    return f"--config.{field}: the config has no field {field}{meant}"


def _fields(config: Any, prefix: str = "") -> list[str]:
    names = []
    for key in config:
        value = config[key]
        names.append(prefix + key)
        if hasattr(value, "items"):
            names.extend(_fields(value, f"{prefix}{key}."))
    return names


def parse_stages(given: Sequence[str] | None) -> tuple[str, ...]:
    """The stages to run, in their order.

    Raises:
      UserError: an unknown one.
    """
    from prism_jax.config import STAGES

    if given is None:
        return STAGES
    for stage in given:
        if stage not in STAGES:
            near = difflib.get_close_matches(stage, STAGES, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown stage {stage!r}{meant}; allowed: {', '.join(STAGES)}")
    return tuple(stage for stage in STAGES if stage in given)


# --- before and beside the work -------------------------------------------------------------


def prepare_environment(*, deterministic: bool) -> None:
    """Fix what decides bits and speed, before JAX creates a backend.

    NPROC is the size of XLA's CPU thread pool. Values already in the environment win.
    """
    os.environ.setdefault("NPROC", "8")
    if deterministic and "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        flag = "--xla_gpu_deterministic_ops=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder(jax.__version__))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder(jax_version: str) -> pathlib.Path:
    """Where compiled programs are kept: per JAX version and processor type."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "prism_jax" / f"jax-{jax_version}-{platform.machine()}"


def check_requirements(experiment: Any, workdir: str, stages: Sequence[str]) -> None:
    """Say everything that is missing at once: images and checkpoints.

    Raises:
      UserError: something is missing; the plan is printed before.
    """
    from prism_jax import plan

    missing = plan.missing(experiment, workdir)
    if missing:
        plan.show(experiment, workdir, measure=False)
        lines = "\n".join(f"  - {line}" for line in missing)
        raise UserError(f"{experiment.name} needs what is not there:\n{lines}")


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """What made the results: commit, versions, machine."""
    import flax
    import jax
    import numpy
    import optax
    import orbax.checkpoint

    import prism_jax

    versions = {
        "prism_jax": prism_jax.__version__,
        "python": platform.python_version(),
        **{m.__name__.split(".")[0]: m.__version__ for m in (jax, flax, optax, numpy)},
        "orbax": orbax.checkpoint.__version__,
    }
    devices = jax.devices()
    machine = {
        "platform": devices[0].platform,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
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

    head = git("rev-parse", "--short=12", "HEAD")
    if head and git("status", "--porcelain", "--untracked-files=no"):
        head += "+"
    return head or None


if __name__ == "__main__":
    sys.exit(main())
