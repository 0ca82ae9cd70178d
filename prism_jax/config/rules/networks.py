"""Rules of ``networks``, and of every field that names some of them."""

from __future__ import annotations

from collections.abc import Iterator

from prism_jax.config.rules.common import normalisation, one_of, repeated
from prism_jax.config.sections import Experiment, Network
from prism_jax.models import ARCHITECTURES


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with networks and with who is named where, one line each."""
    used = {
        "squeeze.teachers": e.squeeze.teachers,
        "recover.pool": e.recover.pool,
        "relabel.teachers": e.relabel.teachers,
        "validate.students": e.validate.students,
        "analyse.network": (e.analyse.network,) if e.analyse.network else (),
    }
    optional = {"analyse.network", "squeeze.teachers"}
    if not e.recover.iterations or e.recover.maker == "generate":
        optional.add("recover.pool")
    for field, names in used.items():
        if not names and field not in optional:
            yield f"{field} is empty; it needs at least one network"
        for name in repeated(names):
            yield f"{field} names {name} twice"
    for name in dict.fromkeys(n for names in used.values() for n in names):
        where = next(field for field, names in used.items() if name in names)
        yield from _readable(e, where, name)
    for name, network in e.networks.items():
        yield from _weights(name, network)
        yield from _outputs(name, network, e.dataset.num_classes)
        yield from normalisation(f"networks.{name}.", network.mean, network.std)
        for field in ("width", "depth"):
            value = getattr(network, field)
            if not value > 0:
                yield f"networks.{name}.{field} is {value}; it must be positive"
    for field in ("recover.pool", "relabel.teachers", "analyse.network"):
        for name in used[field]:
            if name not in e.squeeze.teachers:
                yield (
                    f"{field} names {name}, which squeeze.teachers does not; a network that "
                    f"supervises must be trained or imported there "
                    f"(squeeze.teachers: {', '.join(e.squeeze.teachers)})"
                )


def _weights(name: str, network: Network) -> Iterator[str]:
    """Whether what is said of a network's weights can all be meant."""
    if network.checkpoint and network.start_from:
        yield (
            f"networks.{name}.checkpoint is imported as it is, and networks.{name}.start_from is "
            f"trained further: state one of the two"
        )
    if network.weights_key is not None and not network.weights:
        yield (
            f"networks.{name}.weights_key needs networks.{name}.checkpoint or .start_from, the file"
        )


def _outputs(name: str, network: Network, classes: int) -> Iterator[str]:
    """Which outputs of a larger head are the classes: of imported weights alone."""
    cut = [f for f in ("head_classes", "class_indices") if getattr(network, f) is not None]
    if cut and not network.checkpoint:
        yield from (
            f"networks.{name}.{field} cuts the head of an imported network, and without "
            f"networks.{name}.checkpoint it is trained here, with the dataset's classes. Leave it "
            f"out"
            for field in cut
        )
        return
    head = classes if network.head_classes is None else network.head_classes
    if head < classes:
        yield (
            f"networks.{name}.head_classes is {head}; a head of fewer outputs than "
            f"dataset.num_classes={classes} cannot tell the classes apart"
        )
        return
    indices = network.class_indices
    if indices is None or not classes > 0:
        return
    outside = [index for index in indices if not 0 <= index < head]
    if len(indices) != classes or repeated(indices) or outside:
        wrong = [f"{len(indices)} numbers"] if len(indices) != classes else []
        wrong += [f"{i} more than once" for i in repeated(indices)]
        wrong += [f"{i}, which is no output" for i in outside]
        yield (
            f"networks.{name}.class_indices has {', '.join(wrong[:3])}; it must be "
            f"{classes} different outputs, one per class in the order of the labels "
            f"(dataset.num_classes={classes}), each from 0 to {head - 1} "
            f"(how many outputs there are: networks.{name}.head_classes)"
        )


def _readable(e: Experiment, where: str, name: str) -> Iterator[str]:
    """Whether a network exists and reads images of this size."""
    network = e.network(name)
    yield from one_of(f"{where}: the architecture of {name}", network.architecture, ARCHITECTURES)
    if network.architecture in ARCHITECTURES:
        smallest = ARCHITECTURES[network.architecture].smallest(network.stem, network.depth)
        if e.dataset.image_size < smallest:
            small = "" if network.stem == "small" else f"set networks.{name}.stem='small', "
            yield (
                f"dataset.image_size is {e.dataset.image_size}, and {name} "
                f"({network.architecture} with the {network.stem} stem) needs {smallest} or "
                f"more; enlarge the images, {small}or leave it out"
            )
