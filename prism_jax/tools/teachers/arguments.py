"""The command line of ``python -m prism_jax.tools.teachers``."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

from prism_jax.data.datasets import DATASETS
from prism_jax.data.sources import SOURCES
from prism_jax.models.registry import STEMS
from prism_jax.paths import at_home
from prism_jax.tools import teachers
from prism_jax.tools.cli import Parser
from prism_jax.tools.teachers.commands import evaluate_command, import_command, list_command
from prism_jax.tools.teachers.network import FIND


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not 0 < value < float("inf"):
            words = {int: "a positive whole number", float: "a positive number"}
            raise argparse.ArgumentTypeError(f"is {text!r}; it must be {words[kind]}")
        return value

    return parse


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"is {text!r}; it must be numbers with commas between, as 0.5,0.5,0.5"
        ) from None


def _indices(text: str) -> str | tuple[int, ...]:
    """Parse "find", "4,0,7", "0-9,20", or the path of a JSON file with a list."""
    if text == FIND:
        return FIND
    if re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*", text):
        ends = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        return tuple(i for span in ends for i in range(span[0], span[-1] + 1))
    try:
        with open(at_home(text)) as file:
            found = json.load(file)
    except (OSError, ValueError):
        found = None
    if isinstance(found, list) and found and all(type(i) is int for i in found):
        return tuple(found)
    raise argparse.ArgumentTypeError(
        f"is {text!r}; it must be outputs as 4,0,7 or 0-9, a file with a JSON list of them, or "
        f"{FIND}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description = (teachers.__doc__ or "").split("\n\n", 2)
    root = Parser(
        prog="python -m prism_jax.tools.teachers",
        description="\n\n".join(description[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=run.__doc__, description=run.__doc__, allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    listing = command("list", list_command)
    listing.add_argument("--names", action="store_true", help="only the names, one per line")

    importing, evaluating = command("import", import_command), command("evaluate", evaluate_command)
    for added in (importing, evaluating):
        add = added.add_argument
        add(
            "file",
            type=at_home,
            help=".pth, .safetensors, .msgpack, .npz, a squeeze/<teacher> folder, Orbax",
        )
        add("--architecture", required=True, help="a name of `list`")
        add("--weights-key", help="of a file with several networks: what the names begin with")
        add("--num-classes", type=_positive(int), help="of the head (default: as in the file)")
        add("--image-size", type=_positive(int), help="side in pixels (default: the usual one)")
        add("--width", type=_positive(float), default=1.0, help="multiplier of the channels")
        add("--depth", type=_positive(float), default=1.0, help="multiplier of the blocks")
        add("--stem", choices=STEMS, default="imagenet", help="small: for 16 to 64 px")
        add("--mean", type=_numbers, help="of its training pixels in [0, 1], one per channel")
        add("--std", type=_numbers, help="one per channel (default: the data set's)")
    importing.add_argument(
        "--out", type=at_home, help="folder to write weights.safetensors and record.json to"
    )

    add = evaluating.add_argument
    add(
        "--dataset",
        required=True,
        help=f"{', '.join(DATASETS)}, tfds:<builder>, or a name for images of your own",
    )
    add("--source", required=True, help=", ".join(SOURCES))
    add("--path", type=at_home, help="where the images are")
    add(
        "--class-indices",
        type=_indices,
        help="the output that is each class: 4,0,7 or 0-9 or a JSON file; find: by the images",
    )
    add("--save-order", type=at_home, help="file for a class order that is found")
    add("--limit", type=_positive(int), help="test so many images only, drawn over all classes")
    add("--batch-size", type=_positive(int), default=64, help="images per step")
    return root
