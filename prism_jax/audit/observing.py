"""What an attacker sees of a finished run: its images, its student, and the teacher behind both."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_jax import parallel, training
from prism_jax.analysis import membership
from prism_jax.data import workdir
from prism_jax.data.weights import RECORD
from prism_jax.diffusion import quality
from prism_jax.stages import recover, validate
from prism_jax.stages.context import Context
from prism_jax.types import PyTree

# The set itself; a student that was trained on it; and, to compare, the network that labelled it.
ATTACKS = ("set", "student", "teacher")


def observe(context: Context, images_uint8_NHWC: np.ndarray, labels_N: np.ndarray) -> dict:
    """One number per canary and attack, higher for what is likelier to be a member.

    Args:
      images_uint8_NHWC, labels_N: the canaries.
    """
    config = context.config
    labelled = recover.synthetic_set(context)
    student, seed = config.validate.students[0], config.validate.seeds[0]
    teacher = config.relabel.teachers[0]
    among = labelled.images_uint8_NHWC[:]
    distances_N = quality.nearest(images_uint8_NHWC, among) / among[0].size ** 0.5

    def told(name: str, variables: PyTree, is_student: bool) -> np.ndarray:
        module, networks = context.networks.build(name, student=is_student), context.networks
        how = context.inputs.normalisation if is_student else networks.normalisation(name)
        read = training.jitted_forward(module, how, parallel.data_mesh())
        logits_NK = np.asarray(read(variables, images_uint8_NHWC))
        return membership.confidence(logits_NK, labels_N)

    trained = validate.load(context, labelled, student, seed)
    found = {
        "set": membership.likeness(distances_N),
        "student": told(student, trained, True),
        "teacher": told(teacher, context.networks.load(teacher), False),
    }
    top1: dict[str, Any] = {
        "student": workdir.read_record(validate.folder(labelled, student, seed) / RECORD)["top1"],
        "teacher": workdir.read_record(context.networks.folder(teacher) / RECORD)["top1"],
    }
    return {"top1": top1, **{attack: found[attack].tolist() for attack in ATTACKS}}
