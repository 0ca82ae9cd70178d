"""Which of a file's tensors are the network: out of wrappers, and without a common prefix.

Training scripts save a network inside dicts (``{"state_dict": ...}``), with the names of the
modules around it (``module.``, ``_orig_mod.``, ``model.``), and more than once: as it was trained,
and the average of its weights over the training. No list of such words is needed: any tensors
that, without what their names have in common, have just the names of the architecture are it.
"""

from __future__ import annotations

import os.path
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from prism_jax.errors import UserError
from prism_jax.models.layouts import UNUSED, new_names

Path = tuple[str, ...]  # the keys that lead to a tensor, at last its name

_AVERAGES = {"averaged", "average", "avg", "swa", "shadow", "polyak", "teacher"}
_OPTIMISER = re.compile(r"(^|[._])(opt|optims?|optimi[sz]ers?|sched|schedulers?|scaler)[._]")
# What PyTorch puts around a part of a network, within its names.
_AROUND = re.compile(r"(?<=\.)(module|_orig_mod|_(fsdp|checkpoint)_wrapped_module)\.")


class Selection(NamedTuple):
    """The tensors that are the network.

    Attributes:
      paths: by the file's names, without what they have in common.
      fits: whether these are just the architecture's names.
      note: in one line, what was taken and what left; None: there was nothing to choose.
    """

    paths: dict[str, Path]
    fits: bool
    note: str | None


def select(
    shapes: Mapping[Path, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    layouts: tuple[str, ...],
    key: str | None = None,
) -> Selection:
    """Find a network among a file's tensors.

    Of an average of the weights and the weights themselves, the average is taken: it is what the
    training that kept one reports, and what timm's loader takes.

    Args:
      shapes: of the file's tensors.
      wanted: the architecture's shapes in PyTorch's layout, by our names.
      layouts: keys of ``LAYOUTS`` that the architecture's files have.
      key: the beginning of the names to choose from, as "state_dict" or "model_ema.module".

    Returns:
      A network that fits; or else what comes nearest.

    Raises:
      UserError: nothing begins with the key; or several networks fit, none of them an average.
    """
    names = {".".join(path): path for path in shapes}
    among = names
    if key is not None:
        among = {n: path for n, path in names.items() if n.startswith(f"{key.rstrip('.')}.")}
        if not among:
            raise UserError(
                f'no tensor of it is under weights_key="{key}"; there are '
                f"{', '.join(_places(names))}"
            )
    sized = {n: path for n, path in among.items() if shapes[path]}  # no mere numbers
    within = {n: path for n, path in among.items() if not _OPTIMISER.search(n)} or among
    fitting = _all_fitting(within, shapes, wanted, layouts)
    if not fitting:
        bare = {_AROUND.sub("", name): path for name, path in within.items()}
        fitting = _all_fitting(bare, shapes, wanted, layouts) if bare != within else {}
    if not fitting:
        prefixes = _prefixes(within, wanted, len(wanted) // 2)
        nearest = max(prefixes or [""], key=lambda p: _overlap(_under(p, within), wanted, layouts))
        if not _overlap(_under(nearest, within), wanted, layouts):
            nearest = _innermost(within)
        found = _under(nearest, within)
        return Selection(found, False, _taken(nearest, {nearest: found}, sized))
    if len(fitting) > 1:  # only those of the size that is asked for, where sizes differ
        agreeing = {
            prefix: sum(shapes[path] == wanted[new] for new, path in _ours(found, layouts).items())
            for prefix, found in fitting.items()
        }
        most = max(agreeing.values())
        fitting = {p: found for p, found in fitting.items() if agreeing[p] == most}
    averages = [p for p in fitting if _is_average(p)]
    chosen = averages or list(fitting)
    if len(chosen) > 1:
        listed = " or ".join(f'"{p.rstrip(".")}"' for p in chosen)
        raise UserError(
            f"it holds {len(chosen)} networks that fit; say which by its key: {listed} "
            "(--weights-key=KEY; in a run --config.networks.NAME.weights_key=KEY)"
        )
    return Selection(fitting[chosen[0]], True, _taken(chosen[0], fitting, sized))


def _all_fitting(
    names: Mapping[str, Path],
    shapes: Mapping[Path, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    layouts: tuple[str, ...],
) -> dict[str, dict[str, Path]]:
    """The networks that fit, by what their names begin with."""
    found = {
        prefix: _fitting(_under(prefix, names), shapes, wanted, layouts)
        for prefix in _prefixes(names, wanted, len(wanted))
    }
    return {prefix: network for prefix, network in found.items() if network}


def _prefixes(
    names: Mapping[str, Path], wanted: Mapping[str, tuple[int, ...]], least: int
) -> list[str]:
    """Beginnings that so many names have at least."""
    counts = Counter([""] * len(names))
    for name in names:
        counts.update(name[: dot.end()] for dot in re.finditer(r"\.", name))
    longest = max(wanted, key=len)  # for a beginning that does not end with a dot
    cut = {n.removesuffix(longest) for n in names if n.endswith(longest)}
    counts.update({p: len(_under(p, names)) for p in cut - counts.keys()})
    return [p for p, count in counts.items() if count >= least]


def _under(prefix: str, names: Mapping[str, Path]) -> dict[str, Path]:
    return {n[len(prefix) :]: path for n, path in names.items() if n.startswith(prefix)}


def _ours(found: Mapping[str, Path], layouts: tuple[str, ...]) -> dict[str, Path]:
    return {new: found[name] for name, new in new_names(found, layouts).items()}


def _fitting(
    found: Mapping[str, Path],
    shapes: Mapping[Path, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    layouts: tuple[str, ...],
) -> dict[str, Path] | None:
    """Those of the names that are the architecture's, if they are all and others only numbers."""
    ours = new_names(found, layouts)
    extra = [name for name, new in ours.items() if new not in wanted]
    if not wanted.keys() <= set(ours.values()) or any(shapes[found[name]] for name in extra):
        return None
    return {name: found[name] for name in ours if name not in extra}


def _overlap(
    found: Mapping[str, Path], wanted: Mapping[str, tuple[int, ...]], layouts: tuple[str, ...]
) -> int:
    return len(wanted.keys() & _ours(found, layouts).keys())


def _is_average(prefix: str) -> bool:
    words = re.split(r"[._]+", prefix.lower())
    if "online" in words:  # the network beside its average, in the module that averages
        return False
    return any(w in _AVERAGES or w.startswith("ema") or w.endswith("ema") for w in words)


def _innermost(names: Mapping[str, Path]) -> str:
    """What the names of the dict with most tensors begin with, up to a dot."""
    (place, _), *_ = Counter(path[:-1] for path in names.values()).most_common(1)
    common = os.path.commonprefix([n for n, path in names.items() if path[:-1] == place])
    return common[: common.rfind(".") + 1]


def _places(names: Mapping[str, Path]) -> list[str]:
    """The first keys of names, with how many tensors are under each."""
    counts = Counter(name.partition(".")[0] for name in names)
    shown = [f'"{place}" ({count} tensors)' for place, count in counts.most_common(6)]
    return [*shown, "..."] if len(counts) > 6 else shown


def _taken(
    prefix: str, networks: Mapping[str, dict[str, Path]], names: Mapping[str, Path]
) -> str | None:
    """Say in one line which network was taken, from which wrapper, and what was left."""
    taken = networks[prefix]
    wrapper = os.path.commonprefix([path[:-1] for path in taken.values()])
    while wrapper and not prefix.startswith(".".join(wrapper) + "."):
        wrapper = wrapper[:-1]
    inside = ".".join(wrapper)
    rest = prefix[len(inside) + 1 :] if inside else prefix
    parts = [f'from "{inside}"'] if inside else []
    parts += [f'without the prefix "{rest}"'] if rest else []
    around = {w for p in taken.values() if (w := _AROUND.search(".".join(p)[len(prefix) :]))}
    parts += [f'without "{around.pop()[0]}" within names'] if around else []
    others = [p.rstrip(".") for p in networks if p != prefix]
    if others:
        parts.append(
            f"averaged over the training (weights_key={' or '.join(others)} takes those of its "
            f"last step: --weights-key={others[0]}, in a run "
            f"--config.networks.NAME.weights_key={others[0]})"
        )
    used = {path for network in networks.values() for path in network.values()}
    left = [n for n, path in names.items() if path not in used and not _OPTIMISER.search(n)]
    left = [n for n in left if not UNUSED.search(n)]
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        parts.append(f"left out {len(left)} other tensor{'s' if len(left) > 1 else ''}: {shown}")
    if not _is_average(prefix) and any(_is_average(n.rpartition(".")[0]) for n in left):
        parts.append("among them an average, which has not all tensors of the network")
    return f"weights {', '.join(parts)}" if parts else None
