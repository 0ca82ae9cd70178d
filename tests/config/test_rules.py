"""What recover refuses: every refusal by its name, and every method's own settings pass."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from configs import base
from configs.digits import config as digits
from prism_jax.config import resolve
from prism_jax.errors import UserError
from prism_jax.labelling import LabelRecipe
from prism_jax.synthesis import Recipe


def with_recover(**fields) -> ConfigDict:
    c = digits(10)
    with c.unlocked(), c.recover.ignore_type():
        for name, value in fields.items():
            c.recover[name] = value
    return c


PYRAMID = {"parametrisation": "pyramid"}
CLIP = {"clip": 1.0, "clip_directory": "clip"}
CLASS_MAJOR = {"batch_order": "class_major", "batch_size": 100}
REFUSED = {
    "votes of nobody": ({"priors": (1.0, 2.0, 3.0, 4.0)}, "no committee votes"),
    "too few votes": ({"method": "cvdd", "priors": (1.0, 2.0)}, "it must be 4 numbers"),
    "best of equals": ({"method": "cvdd", "committee": "best"}, "nobody is better"),
    "unknown committee": ({"committee": "wisest"}, "recover.committee is 'wisest'"),
    "primary elsewhere": ({"statistic_primary": "convnet"}, "not in recover.pool"),
    "primary of turns": (
        {"method": "edc", "statistic_primary": "resnet18"}, "'round_robin' has no primary",
    ),
    "turns of nobody": ({"round_robin_restarts": True}, "nobody takes turns"),
    "sampler": ({"statistics_by": "everybody"}, "recover.statistics_by is 'everybody'"),
    "no statistics": ({"match": ()}, "recover.match is empty"),
    "unknown statistics": ({"match": ("bn", "convs")}, "did you mean conv?"),
    "first convolution": ({"first_layer": "conv"}, "names no statistics of convolutions"),
    "drop": ({"drop": 0.4}, "recover.drop leaves out convolutions"),
    "all dropped": ({"drop": 1.0, "match": ("bn", "conv")}, "must be in [0, 1)"),
    "average": ({"ema_from_zero": True}, "averages nothing"),
    "momentum": ({"ema": 1.0}, "recover.ema is 1.0"),
    "swapped": ({"class_patch_swapped": True, "class_share": 0.5}, "'patch' in recover.match"),
    "share": ({"class_share": 1.5}, "recover.class_share is 1.5; it must be in [0, 1]"),
    "two crops": ({"crop_pad": 2, "crop_curriculum": "cosine"}, "unset one of them"),
    "crops of what is shifted": (
        {"crop_pad": 2, "crop_min": 0.5}, "recover.crop_min is 0.5", "set recover.crop_min=1.0",
    ),
    "a fall of nothing": ({"crop_milestone": 0.5}, "crop_curriculum is 'constant'", "leave it at"),
    "a centred nothing": ({"roll": 0, "roll_centred": True}, "recover.roll=0 rolls nothing"),
    "others of nobody": (
        {"statistics_by": "fixed", "subset_others": 2}, "subset_others is 2", "nobody draws",
    ),
    "one half of nobody": (
        {"method": "gvbsm", "subset_probability": 1.0}, "subset_probability is 1.0", "draws",
    ),
    "heat of nobody": ({"prior_temperature": 2.0}, "prior_temperature is 2.0", "leave it at"),
    "heat of equals": ({"method": "cvdd", "prior_temperature": 2.0}, "no recover.priors vote"),
    "steps nowhere": ({"schedule": "multistep"}, "recover.schedule is 'multistep'", "half_cosine"),
    "flat without logits": ({"flatness": 1.0, "alpha_ce": 0.0}, "recover.alpha_ce is 0"),
    "curriculum": ({"crop_curriculum": "sine"}, "recover.crop_curriculum is 'sine'"),
    "early-late apart": ({"budget": "early_late"}, "holds 1 of recover.ipc=10"),
    "rounds": (
        {"budget": "early_late", "iterations": 5, **CLASS_MAJOR}, "more than recover.iterations=5",
    ),
    "two kinds of phases": (
        {"budget": "early_late", "phase_sizes": (16, 16), **CLASS_MAJOR}, "cannot be combined",
    ),
    "a size of nothing": ({"phase_sizes": (0, 16)}, "(0, 16); its sizes must be positive"),
    "a negative size": ({"phase_sizes": (-8, 16)}, "(-8, 16); its sizes must be positive"),
    "last size": ({"phase_sizes": (16, 14)}, "ends at 14", "dataset.image_size=16"),
    "phases": ({"phase_sizes": (16,) * 9, "iterations": 8}, "more than recover.iterations=8"),
    "patches of a size": (
        {"phase_sizes": (14, 16), "match": ("bn", "patch")}, "number changes with",
    ),
    "encoded again": (
        {"initialise": "folder", "initialise_from": "set", "iterations": 0, "jpeg_quality": 75},
        "recover.jpeg_quality is 75", "set recover.jpeg_quality=None",
    ),
    "optimised for nothing": (
        {"alpha_ce": 0.0, "alpha_bn": 0.0}, "recover.alpha_ce, alpha_bn, clip, total_variation",
    ),
    "parametrisation": ({"parametrisation": "pyramids"}, "did you mean pyramid?"),
    "idle pyramid": (
        {"parametrisation": "pyramid", "iterations": 0}, "recover.iterations is 0); set it",
    ),
    "resolutions of pixels": ({"resolutions": (1, 16)}, "set it to 'pyramid', or unset them"),
    "beyond the image": ({**PYRAMID, "resolutions": (1, 16, 32)}, "rise from 1 or more to"),
    "below the image": ({**PYRAMID, "resolutions": (1, 8)}, "dataset.image_size=16, which is"),
    "falling": ({**PYRAMID, "resolutions": (8, 4, 16)}, "recover.resolutions is (8, 4, 16)"),
    "no pixel": ({**PYRAMID, "resolutions": (0, 16)}, "they must rise from 1 or more"),
    "resolutions of phases": (
        {**PYRAMID, "resolutions": (1, 16), "phase_sizes": (8, 16)}, "phase_sizes has several",
    ),
    "noise": ({"view_noise": -0.1}, "recover.view_noise is -0.1"),
    "encoder without weight": ({"clip_directory": "clip"}, "recover.clip, its weight, is 0"),
    "weight without encoder": ({"clip": 1.0}, "recover.clip_directory=DIR"),
    "against the text": ({**CLIP, "clip": -1.0}, "recover.clip is -1.0"),
    "template": ({**CLIP, "clip_template": "a photo"}, "it needs one {}"),
    "idle clip": ({**CLIP, "iterations": 0}, "nothing is optimised that it could guide"),
    "retrieval": ({"inject_from": "retrieved"}, "nothing is injected"),
    "one phase": (
        {"inject_from": "retrieved", "inject": 0.5, "phase_sizes": (16,)}, "two phases or more",
    ),
    "simplicity": ({"inject_simplicity": 1.5}, "must be in [0, 1]"),
    "features elsewhere": (
        {"initialise": "real_herding", "scorer": "vgg11"}, "'vgg11'; it is not in squeeze.teachers",
    ),
    "retrieved elsewhere": (
        {"inject_from": "retrieved", "inject": 0.5, "phase_sizes": (14, 16), "scorer": "vgg11"},
        "recover.inject_from is 'retrieved', which asks", "it is not in squeeze.teachers",
    ),
    "groups of several slots": (
        {"targets": "groups", "batch_size": 20, "slots_per_batch": 2}, "a batch holds 2 slots",
    ),
    "groups of nothing": ({"targets": "groups", "alpha_bn": 0.0}, "nothing is aligned with them"),
    "groups of convolutions": ({"targets": "groups", "match": ("conv",)}, "names none; add bn"),
    "nobody ranks": (
        {"initialise": "real_group_easiest", "pool": ("convnet",), "primary": "convnet",
         "alpha_bn": 0.0},
        "ranks real images by the BatchNorms of recover.pool (convnet)",
    ),
    "nobody has what is matched": (
        {"pool": ("convnet",), "primary": "convnet", "count_no_bn": True},
        "recover.pool (convnet) has no BatchNorm", "recover.match (bn)", "recover.alpha_bn=0",
    ),
    "nobody has it, nor counts": (
        {"pool": ("convnet",), "primary": "convnet"}, "recover.pool (convnet) has no BatchNorm",
    ),
    "injection": ({"inject": 0.5}, "there is one phase"),
    "density of one": ({"densification": 1.0}, "several slots in a batch"),
    "density of few": (
        {"densification": 1.0, "budget": "early_late", **CLASS_MAJOR}, "cannot be combined",
    ),
    "flat phases": ({"flatness": 1.0, "phase_sizes": (14, 16)}, "phases change their shape"),
    "half a perturbation": ({"perturb_rho": 0.1}, "set both or neither"),
    "the other half": ({"perturb_steps": 3}, "set both or neither"),
    "perturbed turns": (
        {"method": "fadrm", "perturb_rho": 0.1, "perturb_steps": 3}, "by 'round_robin'",
    ),
    "perturbed phases": (
        {"perturb_rho": 0.1, "perturb_steps": 3, "phase_sizes": (14, 16)}, "phases do not",
    ),
    "probes": ({"perturb_probes": True}, "perturbs nothing"),
    "scorer elsewhere": (
        {"initialise": "mosaic", "scorer": "resnet34"}, "'resnet34'; it is not in squeeze.teachers",
    ),
    "scorer for nothing": ({"scorer": "resnet18"}, "asks nobody"),
    "jpeg": ({"jpeg_quality": 0}, "recover.jpeg_quality is 0; it must be in [1, 95]"),
    "pad": ({"crop_pad": -1}, "recover.crop_pad is -1"),
    "kept too late": ({"keep_at": (1, 501)}, "recover.keep_at[1] is 501", "recover.iterations=500"),
    "kept too early": ({"keep_at": (0,)}, "recover.keep_at[0] is 0"),
    "patches": ({"patch_factor": 0}, "recover.patch_factor is 0; it must be positive"),
    "more patches than pixels": (
        {"initialise": "mosaic", "patch_factor": 17, "ipc": 1, "short_classes": "repeat"},
        "recover.patch_factor is 17", "dataset.image_size=16 px", "lower it",
    ),
    "variance": ({"variance_weight": -1.0}, "recover.variance_weight is -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(name):
    fields, *said = REFUSED[name]
    with pytest.raises(UserError) as caught:
        resolve(with_recover(**fields))
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message  # one thing is wrong, and nothing else is said


ALLOWED = {
    "everybody": {"logits_by": "uniform", "statistics_by": "uniform", "alignment_scale": "targets"},
    "one fixed BN teacher": {"statistics_by": "fixed", "statistic_primary": "mobilenet_v2"},
    "statistics of a committee": {"statistics_by": "committee", "priors": (4.0, 3.0, 2.0, 1.0)},
    "gvbsm": {
        "method": "gvbsm", "match": ("bn", "conv", "patch"), "ema": 0.4, "drop": 0.4,
        "densification": 1.0, "first_layer": "conv", **CLASS_MAJOR,
    },
    "edc": {
        "method": "edc", "match": ("bn", "conv", "patch"), "class_share": 0.5,
        "class_patch_swapped": True, "flatness": 1.0, "initialise": "mosaic_shuffled",
    },
    "delt": {"method": "delt", "budget": "early_late", "crop_curriculum": "cosine", **CLASS_MAJOR},
    "fadrm": {"method": "fadrm", "phase_sizes": (14, 16, 14, 16), "inject": 0.5},
    "psm": {
        "method": "psm", "targets": "groups", "initialise": "real_group_hardest",
        "phase_sizes": (14, 16), "inject": 0.5,
    },
    "retrieved": {
        "method": "fadrm", "phase_sizes": (14, 16), "inject": 0.5, "inject_from": "retrieved",
        "scorer": "convnet",
    },
    "selected, asked of another": {"initialise": "real_balanced", "scorer": "convnet"},
    "rded": {"method": "rded", "iterations": 0, "initialise": "mosaic", "pool": ()},
    "shifted": {"crop_pad": 2, "crop_min": 1.0},
    "shifted, as a recipe has it": {"crop_pad": 2, "crop_min": 0.08},
    "heat": {"method": "cvdd", "priors": (4.0, 3.0, 2.0, 1.0), "prior_temperature": 2.0},
    "falling": {"crop_curriculum": "cosine", "crop_milestone": 0.5},
    "convolutions alone": {"pool": ("convnet",), "primary": "convnet", "match": ("bn", "conv")},
    "a patch a pixel": {"initialise": "mosaic", "patch_factor": 16, "short_classes": "repeat"},
    "so many others": {"subset_probability": 1.0, "subset_others": 2},
    "no alignment": {"alpha_bn": 0.0, "match": ("bn",)},
    "pyramid of phases": {"method": "fadrm", "phase_sizes": (14, 16), **PYRAMID},
    "guided alone": {**CLIP, **PYRAMID, "alpha_ce": 0.0, "alpha_bn": 0.0, "view_noise": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_what_has_a_meaning_is_allowed(name):
    experiment = resolve(with_recover(**ALLOWED[name]))
    assert experiment.recover.method == ALLOWED[name].get("method", "prism")


def test_a_value_that_may_stay_where_nothing_reads_it_is_the_default():
    own = base.get_config()
    names = ("subset_others", "subset_probability", "prior_temperature", "crop_milestone")
    assert all(own.recover[name] == getattr(Recipe, name) for name in names)
    assert own.relabel.prior_temperature == LabelRecipe.prior_temperature


def test_alexnet_has_statistics_where_convolutions_are_matched():
    c = with_recover(match=("bn",))
    c.networks.alexnet = ConfigDict({"architecture": "alexnet", "stem": "small"})
    c.squeeze.teachers = (*c.squeeze.teachers, "alexnet")
    c.recover.pool = (*c.recover.pool, "alexnet")
    with pytest.raises(UserError, match="alexnet, which has no BatchNorm"):
        resolve(c)
    c.recover.match = ("bn", "conv")
    assert resolve(c).recover.pool[-1] == "alexnet"


# --- an image alone in a BatchNorm group ------------------------------------------------------


def with_batches(size: int, **validate) -> ConfigDict:
    c = with_recover(ipc=2)  # 20 images
    c.relabel.batch_size = c.validate.batch_size = size
    with c.validate.ignore_type():
        for name, value in validate.items():
            c.validate[name] = value
    return c


def test_a_last_batch_of_one_image_is_refused_with_batches_that_leave_none():
    with pytest.raises(UserError, match="one of the 20 images.*to 17 or 18 or 20"):
        resolve(with_batches(19, accumulate=1))
    resolve(with_batches(18, accumulate=1))
    resolve(with_batches(19, accumulate=1, students=("convnet_d3_none",)))  # nothing to normalise


def test_groups_of_one_image_are_refused():
    with pytest.raises(UserError, match="groups of one image"):
        resolve(with_batches(10, bn_group=1))
    with pytest.raises(UserError, match="groups of one image"):
        resolve(with_batches(10, accumulate=10))
    resolve(with_batches(50, accumulate=2))  # 20 images are one batch, in two groups of ten


@pytest.mark.parametrize("field", ["seed", "squeeze.seed", "validate.seeds"])
@pytest.mark.parametrize("value", [-1, 2**32, 20261128120000])
def test_a_seed_is_32_bits_of_a_key(field, value):
    """A larger one would end in NumPy's error, after teachers are paid for."""
    c = digits(10)
    c.update_from_flattened_dict({field: (0, value) if field.endswith("seeds") else value})
    with pytest.raises(UserError, match=f"{field} is {value}; it must be zero or positive, and"):
        resolve(c)


# --- a head with more outputs than there are classes ------------------------------------------


def with_head(**fields) -> ConfigDict:
    c = digits(10)
    c.networks.resnet18 = base.network(architecture="resnet18", stem="small", **fields)
    return c


IMPORTED = {"checkpoint": "weights.pth", "head_classes": 12}
HEADS = {
    "a head of what is trained": ({"head_classes": 12}, "head_classes cuts the head"),
    "as many outputs": ({"head_classes": 10}, "head_classes cuts the head"),
    "outputs of what is trained": (
        {"class_indices": tuple(range(10))}, "networks.resnet18.class_indices cuts the head",
    ),
    "further, too": ({"start_from": "a.pth", "head_classes": 12}, "head_classes cuts the head"),
    "too small": ({**IMPORTED, "head_classes": 9}, "head_classes is 9", "num_classes=10"),
    "too few": ({**IMPORTED, "class_indices": (3, 1, 2)}, "has 3 numbers", "10 different outputs"),
    "too many": ({**IMPORTED, "class_indices": tuple(range(11))}, "has 11 numbers"),
    "twice": ({**IMPORTED, "class_indices": (*range(9), 8)}, "has 8 more than once"),
    "negative": ({**IMPORTED, "class_indices": (*range(9), -1)}, "-1, which is no output"),
    "beyond": ({**IMPORTED, "class_indices": (*range(9), 12)}, "12, which is no", "from 0 to 11"),
    "beyond the classes": (
        {"checkpoint": "weights.pth", "class_indices": (*range(9), 10)}, "10, which is no output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_outputs_are_those_of_imported_weights_one_for_each_class(name):
    """A head that is trained on ten labels and read at other outputs knows nothing."""
    fields, *said = HEADS[name]
    with pytest.raises(UserError) as caught:
        resolve(with_head(**fields))
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message


def test_outputs_in_any_order_are_allowed():
    chosen = (11, 0, 1, 2, 3, 4, 5, 6, 7, 8)
    found = resolve(with_head(**IMPORTED, class_indices=chosen)).network("resnet18")
    assert found.class_indices == chosen
    order = tuple(reversed(range(10)))  # a permuted head of as many
    resolve(with_head(checkpoint="weights.pth", class_indices=order))
    resolve(with_head(**IMPORTED))  # which of them, the data may say
