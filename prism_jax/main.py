"""The command line: flags -> experiment -> stages in order. Nothing scientific happens here.

    python -m prism_jax.main --config=configs/digits_ipc10.py

JAX is imported once ``environment`` has prepared for it.
"""

from __future__ import annotations

import difflib
import errno
import functools
import os
import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import config_flags

from prism_jax.config import KINDS, STAGES
from prism_jax.environment import EarlyInterrupt, prepare_environment, provenance
from prism_jax.errors import Unreachable, UserError
from prism_jax.paths import at_home

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
    --target=MACHINE     with --plan: on another machine (h100, h100x8, v5e:4x4, ...), by its
                         compiler; no such device is needed
    --distributed=MODE   auto (default): join the processes that SLURM or Open MPI started; off:
                         this process alone; on: let JAX find out, as on a TPU slice
    --coordinator=HOST:PORT --processes=N --process=I
                         join N processes by hand, the same command on each; I from 0
    --help               this text

Examples:
    python -m prism_jax.main --config=configs/digits_ipc10.py
    python -m prism_jax.main --config=configs/digits_sre2l_ipc10.py --from=runs/digits_ipc10
    python -m prism_jax.main --config=configs/imagenet_ipc10.py --plan
    python -m prism_jax.main --config=configs/imagenet_ipc10.py:smoke \\
        --config.dataset.path=/data/imagenet
    python -m prism_jax.main --config=configs/digits_ipc10.py --stages=validate,analyse \\
        --config.validate.seeds="(0, 1, 2)"

Exit status: 0 done, 2 something given cannot be used, 1 another failure, 130 or 143 stopped by
Ctrl-C or SIGTERM (everything is saved; the same command continues).
"""

_WITH_VALUE = (
    "--workdir", "--from", "--stages", "--target", "--distributed", "--coordinator", "--processes",
    "--process",
)  # fmt: skip
_PATHS = ("config", "workdir", "from")
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status.
    """
    return guarded(_main, argv, HELP)


def guarded(run: Callable[[list[str]], int], argv: Sequence[str] | None, help_text: str) -> int:
    """Run a command; what a person can mend is one message, never a traceback.

    Args:
      run: the command: flags to exit status.
      argv: the flags; None: those of this process.
      help_text: what ``--help``, or no flag at all, prints.

    Returns:
      The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    as_it_was, warnings.formatwarning = warnings.formatwarning, _warnings_once()
    ours = threading.current_thread() is threading.main_thread()  # others handle no signals
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM) if ours}
    try:
        if handlers.get(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, EarlyInterrupt())
        return _guarded(run, argv, help_text)
    finally:
        warnings.formatwarning = as_it_was
        for signum, handler in handlers.items():
            if handler is not None:  # None: of a program that Python is a part of
                signal.signal(signum, handler)


def _warnings_once() -> Callable[..., str]:
    """A form of warnings: our own are a line, said once; others name their place in the code."""
    plain, said = warnings.formatwarning, set[str]()
    ours = os.path.dirname(os.path.abspath(__file__)) + os.sep

    def form(message: Any, category: type[Warning], filename: str, *more: Any) -> str:
        if not (issubclass(category, UserWarning) and os.path.abspath(filename).startswith(ours)):
            return plain(message, category, filename, *more)
        line = f"warning: {message}\n"
        if line in said:
            return ""
        said.add(line)
        return line

    return form


def _guarded(run: Callable[[list[str]], int], argv: list[str], help_text: str) -> int:
    if not argv or any(a in ("--help", "-h", "-help") for a in argv):
        print(help_text, end="")
        return 0
    try:
        return run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Unreachable) else 2
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        print(
            f"error: {error.filename or 'a file'} cannot be used: {error.strerror}. What was "
            f"finished is kept; run the same command again when that is solved, or with another "
            f"--workdir.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped by SIGINT before any work had begun.", file=sys.stderr)
        return 130


def _status(error: BaseException) -> int:
    """2 for what would come again, 1 for what may not."""
    from prism_jax.data.image_set import DamagedFile

    given = isinstance(error, UserError) and not isinstance(error, Unreachable | DamagedFile)
    return 2 if given or (isinstance(error, OSError) and error.errno in _UNWRITABLE) else 1


def _main(argv: list[str]) -> int:
    problems: list[str] = []
    config, given = parse(argv, problems)
    stages = parse_stages(given.stages, problems)
    target = parse_target(given, problems)
    prepare_environment(config, problems)
    join_processes(given)
    find_devices(given)

    from prism_jax import parallel

    try:
        return _joined(config, given, stages, target, argv, problems)
    except BaseException as error:  # whoever waits for this process must not wait longer
        parallel.say_stopped(str(error) or type(error).__name__, status=_status(error))
        raise


def _joined(
    config: Any,
    given: flags.FlagValues,
    stages: Sequence[str],
    target: Any,
    argv: list[str],
    problems: list[str],
) -> int:
    """The run, where every process knows the others."""
    from prism_jax import parallel
    from prism_jax.config import resolve
    from prism_jax.stages.context import Context
    from prism_jax.stages.coordination import Interrupted, StopSignal

    experiment = resolve(config, problems)
    workdir = given.workdir or f"runs/{experiment.name}"
    source = getattr(given, "from")
    if source == "":
        raise UserError("--from= names no working directory; name one, or leave it out")
    for flag, path in (("workdir", workdir), ("from", source)):
        try:
            _ = path and epath.Path(path).exists()
        except ImportError as error:
            known = str(path).startswith("gs://")
            remedy = "pip install 'prism-jax[gcs]'" if known else "name a bucket at gs://"
            raise UserError(
                f"--{flag}={path} is in a bucket, and what reads one is not installed "
                f"({str(error).splitlines()[0]}): {remedy}, or name a folder"
            ) from error
    if epath.Path(workdir).exists() and not epath.Path(workdir).is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder, or one that is not there")
    if given.plan:
        from prism_jax import plan, progress

        plan.show(experiment, workdir, measure=True, target=target)
        if idle := [f"--{name}" for name in ("stages", "from") if getattr(given, name) is not None]:
            progress.say(f"(of the whole run, whatever is there: {' and '.join(idle)} set aside)")
        return 0
    check_requirements(experiment, workdir)

    stop = StopSignal()
    stop.install()
    context = Context(experiment, workdir, source=source, stop=stop, provenance=provenance(argv))
    try:
        _run(context, stages, argv)
    except Interrupted as interrupted:
        parallel.say_stopped(str(interrupted), status=interrupted.failed)
        print(
            f"stopped by {interrupted}; everything so far is saved in {workdir}. "
            f"Run the same command again to continue.",
            file=sys.stderr,
        )
        return interrupted.status
    finally:
        context.work.lock.release()
    return 0


def _run(context: Any, stages: Sequence[str], argv: Sequence[str]) -> None:
    from prism_jax import parallel, pipeline

    pipeline.check(context)
    context.say(parallel.devices_in_words())
    if context.source:
        context.work.first("adopt", lambda: _adopt(context))
    pipeline.run(context, stages)
    # Once more: the peak of memory is known only now.
    pipeline.summarise(context, provenance(argv))


def _adopt(context: Any) -> None:
    from prism_jax import pipeline, progress

    for folder in pipeline.adopt(context, context.source):
        progress.say(f"adopted {folder} from {context.source}")


# --- flags ----------------------------------------------------------------------------------


def parse(argv: Sequence[str], problems: list[str]) -> tuple[Any, flags.FlagValues]:
    """Parse the flags.

    Args:
      argv: the command line, without the program's name.
      problems: receives a line for every argument that cannot be used: an unknown flag, a field
        that does not exist, a wrong type. Such arguments are left out.

    Returns:
      The config, and the other flags' values.

    Raises:
      UserError: there is no config file, or it cannot be loaded.
    """
    argv = [_at_home(argument) for argument in joined(argv)]
    chosen = [a for a in argv if a.startswith("--config=")]
    if not chosen:
        if "--config" in argv:
            raise UserError("write --config=FILE, with an equals sign")
        raise UserError("no --config=FILE was given; see --help for examples")
    path = chosen[-1].split("=", 1)[1]
    file = pathlib.Path(path.split(":", 1)[0])
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        close = difflib.get_close_matches(str(file), near, n=3) or near[:12]
        there = f"; there are: {', '.join(close)}" if close else ""
        raise UserError(f"no config file at {file}{there}")
    # A config imports its siblings as `configs.base`, wherever the command is run.
    above = list(file.resolve().parents)
    sys.path.insert(0, str(next((p for p in above if (p / "configs").is_dir()), above[0])))
    try:
        config, _ = _parse(chosen[-1:])
    except Exception as error:  # whatever a file of Python may raise
        raise UserError(f"the config {path} cannot be loaded: {_reason(error)}") from error
    unset = [a for a in argv if a.startswith("--config.") and a.endswith("=None")]
    stated = {a.split("=")[0]: a for a in argv}  # of a field that is named twice, the last
    good, others = chosen[-1:], [a for a in argv if a not in (*chosen, *unset)]
    try:
        config, given = _parse([*good, *others])
    except Exception:  # one by one, to say which
        for argument in others:
            try:
                _parse([*good, argument])
                good.append(argument)
            except Exception as error:  # absl and ml_collections raise many kinds
                problems.append(_explain(config, argument, error))
        config, given = _parse(good)
    for argument in unset:  # a flag of ml_collections has no word for it
        *groups, last = argument.removeprefix("--config.").removesuffix("=None").split(".")
        if stated[argument.removesuffix("=None")] != argument:
            continue
        if ".".join((*groups, last)) in _fields(config):
            functools.reduce(lambda node, key: node[key], groups, config)[last] = None
        else:
            problems.append(_explain(config, argument, ValueError()))
    return config, given


def _parse(argv: Sequence[str]) -> tuple[Any, flags.FlagValues]:
    argv, values = ["prism_jax", *argv], flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "experiment", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "working directory", flag_values=values)
    flags.DEFINE_string("from", None, "workdir to adopt from", flag_values=values)
    flags.DEFINE_list("stages", None, "stages to run", flag_values=values)
    flags.DEFINE_bool("plan", False, "print the plan and stop", flag_values=values)
    flags.DEFINE_string("target", None, "the machine of the plan", flag_values=values)
    flags.DEFINE_string("distributed", "auto", "auto, on or off", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many processes", flag_values=values)
    flags.DEFINE_integer("process", None, "which one this is", flag_values=values)
    if rest := values(argv)[1:]:
        raise UserError(f"unexpected argument {rest[0]!r}; flags start with --, see --help")
    return config.value, values


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments, each flag together with its value: "--config.seed", "1" is one flag."""
    found: list[str] = []
    for argument in argv:
        before = found[-1] if found else ""
        waits = before.startswith("--config.") or before in _WITH_VALUE
        if waits and "=" not in before and not argument.startswith("--"):
            found[-1] = f"{before}={argument}"
        else:
            found.append(argument)
    return found


def _at_home(argument: str) -> str:
    """A flag, with the home directory for ``~`` where its value is a path."""
    name, equals, value = argument.partition("=")
    return f"{name}={at_home(value)}" if equals and name.lstrip("-") in _PATHS else argument


def _explain(config: Any, argument: str, error: Exception) -> str:
    """Why an argument cannot be used, what is allowed, and the nearest that is."""
    name, _, value = argument.partition("=")
    if isinstance(error, UserError):
        return str(error)
    if name.startswith("--config."):
        field = name.removeprefix("--config.")
        known = _fields(config)
        if field not in known:
            near = difflib.get_close_matches(field, known, n=3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            group, _, rest = field.partition(".")
            network = rest.partition(".")[0]
            if group == "networks" and f"networks.{network}" not in known:
                meant += (
                    f". A network comes into a config file: c.networks.{network} = "
                    f"base.network(architecture=...)"
                )
            return f"{argument}: the config has no field {field}{meant}"
        if known[field] is type(None):
            return (
                f"{argument}: the config sets {field} to None, which has no type for a flag; write "
                f"the value there, or ml_collections.config_dict.placeholder(int) in place of None"
            )
        wanted = KINDS.get(known[field], "a group of fields")
        return f"{argument}: {field} is {value!r}; it must be {wanted}"
    if isinstance(error, flags.UnrecognizedFlagError):
        names = ("config", *(flag[2:] for flag in _WITH_VALUE), "plan", "help")
        near = difflib.get_close_matches(error.flagname, names, n=1)
        meant = f"; did you mean --{near[0]}?" if near else ""
        return f"unknown flag --{error.flagname}{meant}; allowed: --{', --'.join(names)}"
    return f"{argument} cannot be used; see --help"


def _reason(error: Exception) -> str:
    """The line that says what happened: the last of a traceback, which ml_collections quotes."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if "Traceback" in str(error) else lines[0]


def _fields(config: Any, prefix: str = "") -> dict[str, type]:
    """Every field of a config by its dotted name, with its type."""
    fields: dict[str, type] = {}
    for key in config:
        fields[prefix + key] = config.get_type(key)
        if hasattr(config[key], "items"):
            fields |= _fields(config[key], f"{prefix}{key}.")
    return fields


def check_flags(
    given: flags.FlagValues, kind: str, allowed: Sequence[str], problems: list[str]
) -> None:
    """Name in ``problems`` the flags that a command of another kind has no use for."""
    for name in (flag.removeprefix("--") for flag in _WITH_VALUE):
        if given[name].present and name not in allowed:
            problems.append(
                f"--{name} is a flag of prism_jax.main, and means nothing to {kind}; leave it out "
                f"(allowed: --config, --{', --'.join(allowed)})"
            )


def parse_stages(given: Sequence[str] | None, problems: list[str]) -> tuple[str, ...]:
    """The stages to run, in their order; unknown ones are named in ``problems``."""
    if given is None:
        return STAGES
    if not given:
        problems.append(f"--stages is empty; allowed: {', '.join(STAGES)}")
    for stage in given:
        if stage not in STAGES:
            near = difflib.get_close_matches(stage, STAGES, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"unknown stage {stage!r}{meant}; allowed: {', '.join(STAGES)}")
    return tuple(stage for stage in STAGES if stage in given)


def parse_target(given: flags.FlagValues, problems: list[str]) -> Any:
    """The machine of the plan, or None; what is wrong with it goes to ``problems``."""
    if given.target is None:
        return None
    from prism_jax.accelerators import targets

    if not given.plan:
        problems.append(f"--target={given.target} goes with --plan; a run is where it is started")
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: no device is looked for
    try:
        return targets.parse(given.target)
    except UserError as error:
        problems.append(str(error))
        return None


# --- before and beside the work -------------------------------------------------------------


def join_processes(given: flags.FlagValues) -> None:
    """Join the other processes of this run, where there are any. A plan is one process' work."""
    from prism_jax import parallel

    if not given.plan:
        parallel.start_processes(
            given.distributed,
            coordinator=given.coordinator,
            processes=given.processes,
            process=given.process,
        )


def find_devices(given: flags.FlagValues) -> None:
    """Let JAX look for its devices, once the processes are joined."""
    from prism_jax import parallel, progress

    elsewhere = "a plan is one process' work: run it on one host, or anywhere with --target"
    parallel.find_devices(alone=elsewhere if given.plan else "")
    if not parallel.is_main():
        progress.speak_as(parallel.name())


def check_requirements(experiment: Any, workdir: str) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
