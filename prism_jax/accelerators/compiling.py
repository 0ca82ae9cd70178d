"""One program, compiled for a machine that is not here, in a process of its own.

XLA ends its process where it fails a check, so no compilation may run in the one that asks:

    found = compile_program(experiment, targets.parse("h100"), "recover")

``python -m prism_jax.accelerators.compiling`` is the other end: it reads an order from standard
input and writes what it found to standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from prism_jax.accelerators import account, targets
from prism_jax.accelerators.targets import Target
from prism_jax.config import Experiment, resolve, to_dict
from prism_jax.environment import DETERMINISTIC
from prism_jax.errors import UserError

TIMEOUT = 1800  # seconds; XLA's compiler for TPUs has taken 14 minutes for four networks
# What XLA's CUDA compiler says of a product where there is no device to try on, and the way around.
WITHOUT_TRITON = "--xla_gpu_enable_triton_gemm=false"
_DEVICELESS = (
    "Couldn't find output tile sizes",  # JAX 0.10, of some
    "in deviceless mode",  # 0.11, of those that it would leave to cuBLAS, and ask cuBLAS how
)

COMPILED, ABORTED, HUNG, MEMORY, DEVICELESS, FAILED = OUTCOMES = (
    "compiled", "aborted", "hung", "out of memory", "not without a device", "failed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """What became of one compilation.

    Attributes:
      outcome: one of ``OUTCOMES``.
      line: what the compiler said, where it did not compile.
      lower_seconds, compile_seconds: how long it took.
      memory: bytes on one device: "arguments", "outputs", "temporaries", "shared" (outputs that
        are arguments), "program", and "total".
      collectives: every one, by kind and place.
      cost: of an iteration, see ``account``; None where it did not compile.
      needed_bytes: what a program that does not fit would take, where the compiler says it.
      around: the flag with which it compiled where it does not without a device, or "".
    """

    outcome: str
    line: str = ""
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    collectives: tuple[str, ...] = ()
    cost: account.Account | None = None
    needed_bytes: int | None = None
    around: str = ""


def flags_of(experiment: Experiment) -> str:
    """The XLA flags with which the command line starts JAX for an experiment."""
    return DETERMINISTIC if experiment.parallel.deterministic else ""


def compile_program(
    experiment: Experiment,
    target: Target,
    program: str,
    *,
    flags: str | None = None,
    timeout: float = TIMEOUT,
    prelude: str = "",
) -> Found:
    """Compile a program of an experiment for a machine.

    Args:
      program: a name of ``programs.programs_of``.
      flags: for XLA; None: those that a run would have.
      timeout: seconds, after which the compiler counts as hung.
      prelude: Python that the process runs first; tests break something there.

    Raises:
      UserError: the compiler is not installed, or there is no such program or slice.
    """
    if missing := targets.compiler_missing(target):
        raise UserError(missing)
    order = {
        "experiment": to_dict(experiment), "target": target.name, "program": program,
        "prelude": prelude, "asked_by": os.getpid(),
    }  # fmt: skip
    checkout = str(pathlib.Path(__file__).resolve().parents[2])
    environ = {
        **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        **targets.environment(target),
        "XLA_FLAGS": flags_of(experiment) if flags is None else flags,
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], env=environ, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps(order), timeout=timeout)
    except subprocess.TimeoutExpired:
        _, err = _kill(process)
        return Found(HUNG, f"no end after {timeout:.0f} s; last line: {_last(err)}")
    except BaseException:
        _kill(process)
        raise
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return Found(ABORTED, f"{name}: {_last(err)}")
    if process.returncode:
        return Found(FAILED, _last(err))
    answer = json.loads(out.splitlines()[-1])
    if answer.get("user error"):
        raise UserError(answer["user error"])
    if cost := answer.pop("cost", None):
        always, teachers = cost
        each = {name: account.Cost(**values) for name, values in teachers.items()}
        answer["cost"] = account.Account(account.Cost(**always), each)
    return Found(**answer | {"collectives": tuple(answer.get("collectives", ()))})


def compile_around(experiment: Experiment, target: Target, program: str, **given: Any) -> Found:
    """As ``compile_program``; what does not compile without a device, by the way around that."""
    found = compile_program(experiment, target, program, **given)
    if found.outcome != DEVICELESS:
        return found
    flags = f"{flags_of(experiment)} {WITHOUT_TRITON}".strip()
    found = compile_program(experiment, target, program, **given | {"flags": flags})
    return dataclasses.replace(found, around=WITHOUT_TRITON)


def _kill(process: subprocess.Popen) -> tuple[str, str]:
    """End a process and what it started (ptxas), and read what it had said."""
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()


def _last(errors: str) -> str:
    """The line that says why: a check that failed, else the last that is no stack's."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    checks = [line for line in lines if "Check failed" in line or re.match(r"F\d{4} ", line)]
    plain = [line for line in lines if not re.match(r"@ +0x|\*\*\*|Fatal Python|File \"", line)]
    line = (checks or plain or ["it said nothing"])[-1]
    return re.sub(r"^F\d{4} [\d:.]+ +\d+ ", "", line)


# --- the other end ---------------------------------------------------------------------------


def _answer(order: dict[str, Any]) -> dict[str, Any]:
    """Compile what an order names."""
    import jax

    from prism_jax import parallel, programs

    exec(order["prelude"], {})
    target = targets.parse(order["target"])
    experiment = resolve(order["experiment"])
    precision = experiment.parallel.matmul_precision
    with parallel.described(targets.devices_of(target)), jax.default_matmul_precision(precision):
        program = programs.find(experiment, order["program"])
        began = time.perf_counter()
        lowered = program.lower()
        lowered_at = time.perf_counter()
        seconds = {"lower_seconds": lowered_at - began}
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            seconds["compile_seconds"] = time.perf_counter() - lowered_at
            return _refused(str(error)) | seconds
    seconds["compile_seconds"] = time.perf_counter() - lowered_at
    text = compiled.as_text()
    assert text is not None, "XLA's compilers show their text"
    optimised = experiment.recover.maker == "optimise" and order["program"].startswith("recover")
    cost = account.account(text, target.device, whole=not optimised)
    return {
        "outcome": COMPILED,
        **seconds,
        "memory": _memory(compiled.memory_analysis()),
        "collectives": account.collectives(text),
        "cost": (
            dataclasses.asdict(cost.always),
            {name: dataclasses.asdict(found) for name, found in cost.teachers.items()},
        ),
    }


def _memory(analysis: Any) -> dict[str, int]:
    found = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "shared": analysis.alias_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    return found | {"total": sum(found.values()) - 2 * found["shared"]}


def _refused(error: str) -> dict[str, Any]:
    """Why a compiler refused a program, by what it says."""
    line = next((x for x in error.splitlines() if x.strip()), "")[:500]
    if any(said in error for said in _DEVICELESS):
        return {"outcome": DEVICELESS, "line": line}
    if "RESOURCE_EXHAUSTED" in error or "Ran out of memory" in error:
        used = re.search(r"(?:Used |required .*\()([\d.]+)([KMGT])\)? (?:of|exceeds)", error)
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
        needed = int(float(used[1]) * units[used[2]]) if used else None
        return {"outcome": MEMORY, "line": line, "needed_bytes": needed}
    return {"outcome": FAILED, "line": line}


def _end_with(asker: int) -> None:
    """End this process, and what it started, when nobody is left who asked: it may run for long."""
    while os.getppid() == asker:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to standard error
    order = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(order["asked_by"],), daemon=True).start()
    try:
        answer = _answer(order)
    except UserError as error:
        answer = {"user error": str(error)}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
