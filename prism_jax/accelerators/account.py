"""What one iteration of a compiled program costs, read from the text of its HLO.

A TPU's compiler writes its own estimate of cycles beside every operation. Of a GPU's, the bytes
of every launch's operands and results and the FLOP of its products are counted and held against
the device's rates: what the launch cannot be faster than.

The engine's loop is the one whose count is an argument; any other program is counted whole, what
is in a loop as often as it runs. A teacher's conditional is told by the scope
``teacher/<name>`` of its operations.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

SCOPE = "teacher"  # the name scope of what a teacher's conditional does, see ``synthesis``
COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "bf16": 16}
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")


class Instruction(NamedTuple):
    """One line: its result's shapes as text, its operands' names, everything behind them.

    A constant's value is what is behind its name.
    """

    name: str
    result: str
    op: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """Launches, bytes, FLOP, the least seconds by a device's rates, and a TPU's cycles."""

    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    cycles: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * a for a in _values(self)))


def _values(cost: Cost) -> tuple:
    return dataclasses.astuple(cost)


class Account(NamedTuple):
    """What an iteration costs: always, and for each teacher that is read in it."""

    always: Cost
    teachers: dict[str, Cost]

    def mean(self, shares: Mapping[str, float]) -> Cost:
        """The mean iteration, teachers being read in these shares of all (unknown ones: 1)."""
        parts = (cost * shares.get(name, 1.0) for name, cost in self.teachers.items())
        return sum(parts, self.always)


class Module:
    """The computations of an HLO module, by name."""

    def __init__(self, text: str):
        self.entry = ""
        self.computations: dict[str, list[Instruction]] = {}
        now: list[Instruction] | None = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                now = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                now = None
            elif now is not None and (found := _INSTRUCTION.match(line)):
                name, result, op, rest = found.groups()
                inside, rest = _split(rest)
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                now.append(
                    Instruction(name, result, op, operands, inside if op == "constant" else rest)
                )

    def called(self, instruction: Instruction, *attributes: str) -> list[str]:
        """The computations that an instruction names under some attributes."""
        found = []
        for attribute in attributes:
            if match := re.search(attribute + r"=(\{[^}]*\}|%[\w.\-]+)", instruction.rest):
                found += re.findall(r"%([\w.\-]+)", match[1])
        return found

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs; None where an argument says it.

        A GPU's compiler writes it down. A TPU's does not: there a counter that begins at zero and
        goes by ones, as JAX's loops have it, is held against a constant.
        """
        if found := re.search(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)', loop.rest):
            return int(found[1])
        condition = self.computations[self.called(loop, "condition")[0]]
        root, by_name = condition[-1], {i.name: i for i in condition}
        if root.op != "compare" or "direction=LT" not in root.rest:
            return None
        bound = by_name[root.operands[1]]
        return int(bound.rest) if bound.op == "constant" else None


def _split(text: str) -> tuple[str, str]:
    """What is inside the parenthesis that is open, and what comes behind it."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:at], text[at + 1 :]
    return text, ""


def collectives(text: str) -> list[str]:
    """Every collective: its kind, and what it is for by the program's own names."""
    found = []
    for kind in COLLECTIVES:
        for line in re.findall(rf"^.* {kind}(?:-start)?\(.*$", text, re.MULTILINE):
            name = re.search(r'op_name="([^"]*)"', line)
            found.append(f"{kind} in {name[1] if name else 'the program'}")
    return found


def account(text: str, device: Any = None, *, whole: bool = False) -> Account:
    """What an iteration costs, or a program that has none.

    Args:
      text: a compiled module's.
      device: a ``targets.Device``, against whose rates launches are held.
      whole: it is not the engine's; a loop of unknown count is no iteration, and counts once.
    """
    module = Module(text)
    loops = [i for i in module.computations[module.entry] if i.op == "while" and not whole]
    bodies = [module.called(i, "body")[0] for i in loops if module.trips(i) is None]
    counted = [_count(module, body, device) for body in bodies or [module.entry]]
    return max(counted, key=lambda a: sum(_values(a.mean({}))[3:]))


def _count(module: Module, name: str, device: Any) -> Account:
    """Everything that a computation runs, with what it calls."""
    always = Cost()
    teachers: dict[str, Cost] = collections.defaultdict(Cost)
    types = {i.name: i.result for i in module.computations[name]}
    for i in module.computations[name]:
        inner: Iterable[Account] = ()
        if i.op == "while":
            inner = [_count(module, b, device) for b in module.called(i, "body")]
        elif i.op == "conditional":
            keys = "true_computation", "false_computation", "branch_computations"
            branches = [(b, _count(module, b, device)) for b in module.called(i, *keys)]
            where, dearest = max(branches, key=lambda found: sum(_values(found[1].mean({}))[3:]))
            if teacher := _teacher(module, where):
                teachers[teacher] += dearest.mean({})
                continue
            inner = [dearest]
        elif i.op == "call":
            inner = [_count(module, b, device) for b in module.called(i, "to_apply", "calls")]
        elif i.op not in _FREE and not i.op.endswith("-done"):
            always += _launch(module, i, types, device)
        for part in inner:
            times = (module.trips(i) or 1) if i.op == "while" else 1
            always += part.always * times
            for teacher, cost in part.teachers.items():
                teachers[teacher] += cost * times
    return Account(always, dict(teachers))


def _teacher(module: Module, branch: str) -> str | None:
    """Whose conditional a branch belongs to: the name in most of its operations' scopes."""
    names = collections.Counter(
        name
        for i in module.computations[branch]
        for name in re.findall(rf"[/(]{SCOPE}/([^/\")]+)", i.rest)
    )
    return names.most_common(1)[0][0] if names else None


def _launch(module: Module, i: Instruction, types: Mapping[str, str], device: Any) -> Cost:
    cycles = re.search(r'"estimated_cycles":"?(\d+)', i.rest)
    # A library's second result is its workspace.
    result = i.result.split("u8[")[0].split("s8[")[0] if i.op == "custom-call" else i.result
    size = _bytes(result) + sum(_bytes(types.get(name, "")) for name in i.operands)
    flops, kind = _products(module, i, types)
    seconds = 0.0
    if device is not None and "tensorfloat32" in device.flops:
        seconds = max(size / device.bytes_per_second, flops / device.flops[kind])
    return Cost(1, size, flops, seconds, float(cycles[1]) if cycles else 0.0)


# --- products ---------------------------------------------------------------------------------


def _products(module: Module, i: Instruction, types: Mapping[str, str]) -> tuple[float, str]:
    """The FLOP of an instruction's products, and at which of a device's rates they run."""
    if i.op == "fusion":
        found = []
        for name in module.called(i, "calls"):
            inner = {j.name: j.result for j in module.computations[name]}
            found += [_products(module, j, inner) for j in module.computations[name]]
        found = [(flops, kind) for flops, kind in found if flops]
        return sum(f for f, _ in found), found[0][1] if found else "float32"
    if i.op == "dot" or "matmul" in i.rest:
        lhs = _dims(types[i.operands[0]])
        contracted = re.search(r'lhs_contracting_dimensions"?[=:][\[{]([\d",]*)', i.rest)
        if contracted is None:
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)", i.rest)
        assert contracted, "a product says over which of its axes it sums"
        over = [int(d) for d in re.findall(r"\d+", contracted[1])]
        flops = 2.0 * math.prod(_dims(i.result)) * math.prod(lhs[d] for d in over)
        return _paid(flops, types[i.operands[0]], i.rest)
    if i.op in ("convolution", "custom-call") and (dims := _convolved(i, types)):
        multiplied, grouped = dims
        if grouped:  # depthwise: on no matrix unit
            return 2.0 * multiplied, "float32"
        return _paid(2.0 * multiplied, types[i.operands[0]], i.rest)
    return 0.0, "float32"


def _paid(flops: float, operand: str, attributes: str) -> tuple[float, str]:
    """FLOP as they are paid for: by what is multiplied, and by the precision that is asked for."""
    shape = _SHAPE.search(operand)
    assert shape, "an operand of a product has a shape"
    if "bf16" in shape[0]:
        return flops, "bfloat16"
    if passes := re.search(r"dot_(bf16|tf32)_\1_f32_x(\d)", attributes.lower()):
        kind = {"bf16": "bfloat16", "tf32": "tensorfloat32"}[passes[1]]
        return flops * int(passes[2]), kind
    exact = re.search(r'operand_precision"?[=:][\[{]"?highest', attributes.lower())
    return flops, "float32" if exact else "tensorfloat32"


def _convolved(i: Instruction, types: Mapping[str, str]) -> tuple[float, bool] | None:
    """Multiplications of a convolution, and whether it is depthwise; None for anything else."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    if labels is None:
        return None
    backward_input, backward_filter = (f"convBackward{x}" in i.rest for x in ("Input", "Filter"))
    left, right, result = (_dims(t) for t in (*(types[o] for o in i.operands[:2]), i.result))
    # The sum runs over the output of the forward convolution, whichever argument that is.
    kernel = result if backward_filter else right
    output = left if backward_input else right if backward_filter else result
    of_kernel, of_output = labels[2], labels[1] if backward_input else labels[3]
    taps = math.prod(n for n, c in zip(kernel, of_kernel, strict=True) if c.isdigit())
    inputs = kernel[of_kernel.index("i")]
    features = kernel[of_kernel.index("o")]
    places = math.prod(n for n, c in zip(output, of_output, strict=True) if c.isdigit() or c == "b")
    groups = re.search(r"feature_group_count=(\d+)", i.rest)
    depthwise = groups is not None and int(groups[1]) == features
    return float(places * taps * inputs * features), depthwise


def _bytes(text: str) -> float:
    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * _width(kind) / 8
        for kind, dims in _SHAPE.findall(text)
    )


def _width(kind: str) -> int:
    return _BITS.get(kind) or int(kind[1:])


def _dims(text: str) -> list[int]:
    found = _SHAPE.search(text)
    assert found, "an operand or result of a product has a shape"
    return [int(d) for d in found[2].split(",") if d]
