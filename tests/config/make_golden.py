"""Write every config's resolved experiment as text, one line a field: make golden"""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "config" / "golden"
METHOD_ARGUMENTS = ("imagenet,ipc10", "digits,ipc10")


def configs() -> dict[str, tuple[str, str]]:
    """(module, argument) of every text, by its name."""
    found = {}
    for path in sorted((ROOT / "configs").rglob("*.py")):
        if "def get_config" not in path.read_text() or path.parent.name in ("audit", "compare"):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        arguments = METHOD_ARGUMENTS if path.parent.name == "methods" else ("",)
        if path.stem == "imagenet_ipc10":
            arguments = ("", "official")
        for argument in arguments:
            words = [path.stem, *filter(None, argument.split(","))]
            found["_".join(words)] = module, argument
    return found


def text(module: str, argument: str) -> str:
    """A config's experiment, sorted, one line a field."""
    from prism_jax.config import resolve, to_dict

    config = importlib.import_module(module).get_config(argument)
    if config.dataset.num_classes is None:
        config.dataset.num_classes = 10  # those of a person's images, which are not here
    experiment = resolve(config)
    return "".join(f"{name} = {value!r}\n" for name, value in sorted(_leaves(to_dict(experiment))))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def main() -> None:
    """Write all texts, and remove those of configs that are gone."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.txt"):
        path.unlink()
    for name, where in configs().items():
        (FOLDER / f"{name}.txt").write_text(text(*where))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
