"""What may be said in a config of a set and of labels that somebody else made."""

from __future__ import annotations

from typing import Any

from prism_jax.data.sets.floats import MEAN, STD, WHITENING, WHITENINGS


def violations(experiment: Any) -> list[str]:
    """Everything that is wrong with it, as lines for a message."""
    recover, relabel, found = experiment.recover, experiment.relabel, []
    mean, std = recover.initialise_mean, recover.initialise_std
    if (mean is None) != (std is None) or (mean and std and len(mean) != len(std)):
        found.append(
            f"{MEAN} is {mean} and {STD} is {std}; they belong together, with one number per "
            "channel each"
        )
    if std and min(std) <= 0:
        found.append(f"{STD} is {std}; its numbers must be positive")
    if recover.initialise_whitening not in (None, *WHITENINGS):
        found.append(
            f"{WHITENING} is {recover.initialise_whitening!r}; allowed: {', '.join(WHITENINGS)}"
        )
    if recover.initialise != "folder":
        for name in ("classes", "mean", "std", "whitening"):
            if getattr(recover, f"initialise_{name}") is not None:
                found.append(
                    f"recover.initialise_{name} says something of the set that "
                    f"recover.initialise_from names, and recover.initialise is "
                    f"{recover.initialise!r}, which reads none; leave it unset, or set "
                    f"recover.initialise=folder"
                )
    if relabel.labels_from and not experiment.soft_labels:
        found.append(
            f"relabel.labels_from is {relabel.labels_from}, and with validate.loss='ce' students "
            "read no soft labels; leave it unset, or choose another validate.loss"
        )
    if relabel.labels_from == "set":
        if recover.initialise != "folder" or recover.iterations:
            found.append(
                "relabel.labels_from is 'set', the labels that came with imported images; it needs "
                "recover.initialise=folder and recover.iterations=0"
            )
        if relabel.mix != "none" or relabel.patch_shuffle > 1:
            found.append(
                "relabel.labels_from is 'set', one label per image, which is not that of mixed or "
                "shuffled images; set relabel.mix=none and relabel.patch_shuffle=1"
            )
    return found
