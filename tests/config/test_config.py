"""From a ConfigDict to an experiment: what is refused, and that one message says all of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import re
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from configs import base, imagenet_ipc10
from configs.digits import config as digits
from prism_jax import config as configs
from prism_jax.config import Layout, batch_layout, budget_of, resolve
from prism_jax.errors import UserError
from prism_jax.stages import fingerprints

FILES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
    if "def get_config" in path.read_text()
)


ARGUMENTS = {
    "imagenet": ("smoke", "official", "smoke,official", "folder", "smoke,official,folder"),
    "imagenette": ("cpu", "folder", "cpu,folder"),
    "cifar10": ("cpu", "folder", "cpu,folder"),
    "cifar10_teachers": ("mobilenet_v2", "shufflenet_v2_x0_5,convnet_d3_bn"),
}


def changed(**fields) -> ConfigDict:
    """The digits config with ``section__field`` set to values."""
    c = digits(10)
    with c.unlocked():
        for path, value in fields.items():
            *sections, field = path.split("__")
            at = c
            for section in sections:
                at = at[section]
            with at.ignore_type():
                at[field] = value
    return c


def refusal(c: ConfigDict) -> str:
    with pytest.raises(UserError) as caught:
        resolve(c)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_every_config_file_resolves(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    if name == "own_folder":
        assert "--config.dataset.path=DIR" in refusal(config)
        config.dataset.num_classes = 10
    experiment = resolve(config)
    generates = experiment.recover.maker == "generate"
    assert (experiment.recover.iterations > 0) != generates
    for arg in ARGUMENTS.get(name, ARGUMENTS.get(name.split("_")[0], ())):
        c = module.get_config(arg)
        if "folder" in arg:
            assert "recover.initialise_from=DIR" in refusal(c)
            c.recover.initialise_from = "set"
        other = resolve(c)
        # Another run, but for teachers that lie beside one another.
        assert (other.name != experiment.name) == (name != "cifar10_teachers")
        if "folder" in arg:
            assert set(other.squeeze.teachers) == set(other.relabel.teachers)


def test_values_arrive_as_they_are():
    e = resolve(changed(recover__iterations=7, recover__pool=["resnet18"], recover__alpha_bn=1))
    assert e.recover.iterations == 7
    assert e.recover.pool == ("resnet18",)
    assert e.recover.alpha_bn == 1.0 and isinstance(e.recover.alpha_bn, float)
    assert e.recover.batch_size is None
    assert e.network("mobilenet_v2").width == digits(10).networks.mobilenet_v2.width
    assert e.network("vgg11").architecture == "vgg11"  # not listed: the architecture itself
    assert json.loads(json.dumps(configs.to_dict(e))) == configs.to_dict(e)
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.recover.iterations = 8


def test_names_may_be_one_string():
    e = resolve(changed(recover__pool="resnet18, mobilenet_v2"))
    assert e.recover.pool == ("resnet18", "mobilenet_v2")


REFUSED = {
    "misspelt": ({"recover__iteration": 5}, "recover.iteration", "did you mean recover.iterations"),
    "misspelt section": ({"recovr": 5}, "recovr", "did you mean recover?"),
    "text for a number": ({"recover__iterations": "many"}, "recover.iterations is 'many'", "whole"),
    "a fraction": ({"recover__ipc": 1.5}, "recover.ipc is 1.5", "whole number"),
    "a truth for a number": ({"recover__ipc": True}, "recover.ipc is True", "whole number"),
    "a number for a truth": ({"recover__flip": 1}, "recover.flip is 1", "True or False"),
    "a value for a section": ({"recover": 3}, "recover is 3", "group of fields"),
    "NaN": ({"recover__learning_rate": float("nan")}, "recover.learning_rate is nan", "number"),
    "two betas": ({"recover__betas": (0.5,)}, "recover.betas", "2 values"),
    "negative": ({"recover__iterations": -1}, "recover.iterations is -1", "zero or positive"),
    "zero": ({"recover__ipc": 0}, "recover.ipc is 0", "must be positive"),
    "crop": ({"relabel__crop_min": 1.5}, "relabel.crop_min is 1.5", "(0, 1]"),
    "beta": ({"recover__betas": (0.5, 1.0)}, "recover.betas[1] is 1.0", "[0, 1)"),
    "choice": ({"recover__granularity": "per_image"}, "recover.granularity", "per_slot"),
    "method": ({"recover__method": "prsm"}, "recover.method is 'prsm'", "prism"),
    "loss": ({"validate__loss": "mse"}, "validate.loss is 'mse'", "mse_gt"),
    "schedule": ({"validate__schedule": "cosin"}, "validate.schedule", "cosine"),
    "primary": ({"recover__primary": "convnet"}, "recover.primary is 'convnet'", "recover.pool"),
    "architecture": ({"validate__students": ("resnet19",)}, "resnet19", "did you mean resnet18"),
    "twice": ({"recover__pool": ("resnet18",) * 2}, "recover.pool names resnet18 twice",),
    "nobody": ({"relabel__teachers": ()}, "relabel.teachers is empty", "at least one network"),
    "untrained": ({"relabel__teachers": ("resnet34",)}, "squeeze.teachers", "resnet34"),
    "single": (
        {"relabel__teachers": ("resnet18", "mobilenet_v2")}, "relabel.ensemble is 'single'",
    ),
    "half of one": ({"relabel__ensemble": "half_primary"}, "half_primary", "two or more"),
    "no priors": ({"relabel__ensemble": "committee"}, "relabel.priors is None", "be 1 numbers"),
    "too many priors": (
        {"relabel__ensemble": "committee", "relabel__priors": (50.0, 40.0)}, "(50.0, 40.0)",
    ),
    "priors of nobody": (
        {"relabel__priors": (50.0,)}, "relabel.priors is (50.0,)", "relabel.priors=None",
    ),
    "heat of nobody": (
        {"relabel__prior_temperature": 5.0}, "relabel.prior_temperature is 5.0", "nobody votes",
    ),
    "crops of what is shifted": (
        {"relabel__crop_pad": 2}, "relabel.crop_min is 0.25", "set relabel.crop_min=1.0",
    ),
    "steps nowhere": (
        {"squeeze__schedule": "multistep"}, "squeeze.schedule is 'multistep'", "constant, cos2",
    ),
    "group of nobody": ({"relabel__bn_group": 8}, "relabel.bn_group is 8", "is 'eval'"),
    "precision": ({"relabel__precision": "int4"}, "relabel.precision", "float16, float32, int8"),
    "all of ten": ({"relabel__top_k": 10}, "relabel.top_k is 10", "smaller", "unset to keep all"),
    "none of ten": ({"relabel__top_k": 0}, "relabel.top_k is 0", "must be positive"),
    "mode": ({"relabel__mode": "live"}, "relabel.mode is 'live'", "online, store"),
    "batch": ({"recover__batch_size": 30}, "recover.batch_size is 30", "near it these do: 10"),
    "slots": ({"recover__slots_per_batch": 3}, "recover.slots_per_batch is 3", "recover.ipc=10"),
    "budgets": (
        {"recover__slots_per_batch": 2, "recover__budget": "mod8"}, "[438, 500]", "constant",
    ),
    "listed pairs in one batch": (
        {"recover__method": "cvdd", "recover__committee": "listed", "recover__slots_per_batch": 2},
        "holds 2 slots, which have one pair", "recover.slots_per_batch=1",
    ),
    "pairs of nobody": (
        {"recover__committee": "best"}, "recover.committee is best, which counts for nothing",
    ),
    "a folder without a name": ({"recover__initialise": "folder"}, "recover.initialise_from=DIR"),
    "a folder for nothing": (
        {"recover__initialise_from": "set"}, "names set", "'real'", "recover.initialise=folder",
    ),
    "a key without a file": (
        {"networks__resnet18": base.network(architecture="resnet18", weights_key="ema")},
        "networks.resnet18.weights_key", "networks.resnet18.checkpoint",
    ),
    "half a normalisation of a network": (
        {"networks__resnet18": base.network(architecture="resnet18", mean=(0.1,))},
        "networks.resnet18.mean is (0.1,)", "networks.resnet18.std is None", "belong together",
    ),
    "imported and trained": (
        {"networks__resnet18": base.network(
            architecture="resnet18", checkpoint="a.pth", start_from="b.pth")},
        "networks.resnet18.checkpoint", "networks.resnet18.start_from", "one of the two",
    ),
    "the head of what is trained": (
        {"networks__resnet18": base.network(
            architecture="resnet18", start_from="b.pth", head_classes=1000)},
        "networks.resnet18.head_classes", "with the dataset's classes",
    ),
    "a space of nothing": ({"recover__initialise_mean": (0.5,)}, "recover.initialise_std is None"),
    "half a space": (
        {"recover__initialise": "folder", "recover__initialise_from": "set",
         "recover__initialise_mean": (0.5,), "recover__initialise_std": (0.0,)},
        "recover.initialise_std is (0.0,)", "must be positive",
    ),
    "a whitening": (
        {"recover__initialise": "folder", "recover__initialise_from": "set",
         "recover__initialise_whitening": "pca"},
        "recover.initialise_whitening is 'pca'", "allowed: none, zca",
    ),
    "classes of no set": (
        {"recover__initialise_classes": ("cat", "dog")}, "recover.initialise_classes", "'real'",
    ),
    "labels for nobody": (
        {"relabel__labels_from": "labels", "validate__loss": "ce", "validate__controls": ()},
        "relabel.labels_from is labels", "read no soft labels",
    ),
    "a control of what is": (
        {"validate__loss": "ce", "validate__controls": ("synthetic_hard",)},
        "validate.controls names synthetic_hard", "itself has hard labels",
    ),
    "an order of others": (
        {"relabel__labels_from": "set", "relabel__order": "torch"}, "an order of its own",
    ),
    "shuffled views of others": (
        {"relabel__labels_from": "labels", "relabel__patch_shuffle": 2}, "the controls alone",
    ),
    "no list": ({"validate__controls": None}, "validate.controls is None", "list"),
    "labels of no set": ({"relabel__labels_from": "set"}, "initialise=folder", "relabel.mix=none"),
    "no pool": ({"recover__pool": ()}, "recover.pool is empty", "at least one network"),
    "parts": ({"validate__accumulate": 3}, "validate.batch_size 50", "validate.accumulate=3"),
    "parts of other batches": (
        {"validate__batch_size": 64}, "validate.batch_size is 64", "relabel.batch_size is 50",
    ),
    "bn_group": ({"validate__bn_group": 10}, "validate.bn_group is 10", "1, 5, 25"),
    "bn_group of more": ({"validate__bn_group": 50}, "validate.bn_group is 50", "1, 5, 25"),
    "bn_group of none": ({"validate__bn_group": -5}, "validate.bn_group is -5", "1, 5, 25"),
    "bn_group in words": ({"validate__bn_group": "each"}, "validate.bn_group is 'each'", "all"),
    "bn_group over parts": (
        {"validate__bn_group": "all"}, "validate.bn_group is 'all'", "validate.accumulate=1",
    ),
    "devices": (
        {"parallel__train_devices": 4}, "parallel.train_devices is 4",
        "validate.batch_size=50 in BatchNorm groups of 25 can be shared by 1, 2 device(s)",
    ),
    "devices of a teacher": (
        {"parallel__train_devices": 5, "validate__bn_group": 5}, "parallel.train_devices is 5",
        "squeeze.batch_size=64 can be shared by 1, 2, 4, 8",
    ),
    "a batch that devices cannot share": (
        {"parallel__recover_devices": 3}, "parallel.recover_devices is 3", "1, 2",
    ),
    "a span that is mapped": (
        {"parallel__recover_devices": 2, "parallel__map": "pmap"}, "parallel.map is 'pmap'",
        "shard_map",
    ),
    "a span of what is generated": (
        {"parallel__recover_devices": 2, "recover__maker": "generate"},
        "recover.maker='generate' gives every device a batch of its own",
    ),
    "no device": ({"parallel__train_devices": 0}, "parallel.train_devices is 0", "positive"),
    "ema": ({"validate__ema": 1.0}, "validate.ema is 1.0", "between 0 and 1"),
    "momentum": ({"validate__momentum": 1.0}, "validate.momentum is 1.0", "[0, 1)"),
    "a warm-up that begins above its end": (
        {"validate__warmup_epochs": 5, "validate__warmup_start": 1.5},
        "validate.warmup_start is 1.5", "(0, 1]",
    ),
    "a path that nothing reads": (
        {"dataset__path": "/photos"}, "dataset.path is '/photos'", "configs/own_folder.py",
    ),
    "nesterov": ({"validate__nesterov": True}, "validate.nesterov", "'sgd' with momentum"),
    "decay": ({"validate__decay": "norms"}, "validate.decay is 'norms'", "kernels"),
    "zeta": ({"validate__zeta": 0.5}, "validate.zeta is 0.5", "1 or more"),
    "a value of another schedule": (
        {"validate__schedule": "half_cosine", "validate__zeta": 2.0}, "half_cosine has none",
    ),
    "no milestones": ({"validate__schedule": "multistep"}, "validate.milestones", "fractions"),
    "milestones": (
        {"validate__schedule": "multistep", "validate__milestones": (0.9, 0.8)},
        "validate.milestones is (0.9, 0.8)", "rising",
    ),
    "warm-up": ({"validate__warmup_epochs": 150}, "validate.warmup_epochs is 150", "below"),
    "control": ({"validate__controls": ("random",)}, "validate.controls", "random_real"),
    "soft labels that are not made": (
        {"validate__loss": "ce"}, "random_real, whose labels are soft",
        "--config.validate.controls=random_real_hard,full_real",
    ),
    "selected with hard labels alone": (
        {"validate__loss": "ce", "validate__controls": ("real_herding", "full_real")},
        "real_herding, whose labels are soft", "--config.validate.controls=full_real",
    ),
    "selected by nobody": (
        {"validate__controls": ("real_balanced",), "recover__scorer": "vgg11"},
        "validate.controls names real_balanced, which asks", "it is not in squeeze.teachers",
    ),
    "damaged": ({"dataset__damaged": "ignore"}, "dataset.damaged is 'ignore'", "skip, stop"),
    "no thread": ({"dataset__threads": 0}, "dataset.threads is 0", "must be positive"),
    "workers": ({"dataset__workers": -1}, "dataset.workers is -1", "zero or positive"),
    "half a normalisation": ({"dataset__mean": (0.5,)}, "dataset.mean is (0.5,)", "together"),
    "no deviation": (
        {"dataset__mean": (0.5,), "dataset__std": (0.0,)}, "dataset.std is (0.0,)", "positive",
    ),
    "data set": ({"dataset__name": "cifar11"}, "'cifar11' (did you mean cifar10?)", "tfds:<build"),
    "builder elsewhere": (
        {"dataset__name": "tfds:food101", "dataset__source": "folder"},
        "dataset.source is 'folder'", "needs 'tfds'",
    ),
    "no class": ({"dataset__num_classes": 0}, "dataset.num_classes is 0", "must be positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_named_with_its_field_and_what_to_do(case):
    fields, *expected = REFUSED[case]
    message = refusal(changed(**fields))
    for words in expected:
        assert words in message, message


def test_how_a_batch_is_divided_may_be_said_in_several_ways():
    def group(**fields):
        e = resolve(changed(**{f"validate__{name}": value for name, value in fields.items()}))
        return configs.bn_group_of(e.validate)

    assert group() == 25
    assert group(accumulate=1) == 50
    assert group(bn_group=5) == 5
    assert group(accumulate=1, bn_group="all") == 50
    resolve(changed(parallel__train_devices=2))
    resolve(changed(validate__schedule="multistep", validate__milestones=(0.8, 0.9)))


def test_a_missing_field_is_named():
    c = digits(10)
    with c.unlocked():
        del c.recover["iterations"]
    assert "recover.iterations is missing" in refusal(c)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {
                "recover__iterations": -5, "recover__primary": "nobody", "relabel__crop_min": 0.0,
                "validate__loss": "l1", "recover__batch_size": 40, "validate__students": ("vgg99",),
            },
            ["recover.iterations", "recover.primary", "relabel.crop_min", "validate.loss",
             "recover.batch_size", "vgg99"],
        ),
        (
            {"recover__ipc": "ten", "seed": 0.5, "squeeze__epoch": 3},
            ["recover.ipc", "seed", "squeeze.epoch"],
        ),
    ],
)  # fmt: skip
def test_one_message_names_every_mistake(fields, named):
    message = refusal(changed(**fields))
    for name in named:
        assert name in message, message
    assert re.search(rf"\b{len(named)}\b", message), message  # and counts them


def test_no_pool_is_needed_where_nothing_is_optimised():
    assert resolve(changed(recover__pool=(), recover__iterations=0)).recover.pool == ()


def test_a_teacher_without_batch_norm_must_be_asked_for():
    c = imagenet_ipc10.get_config("official")
    resolve(c)
    c.recover.count_no_bn = False
    message = refusal(c)
    assert "alexnet" in message and "recover.count_no_bn=True" in message


# --- how the set divides into batches ----------------------------------------------------------


def layout(classes: int, ipc: int, **recover) -> Layout:
    e = resolve(digits(10))
    e = dataclasses.replace(
        e,
        dataset=dataclasses.replace(e.dataset, num_classes=classes),
        recover=dataclasses.replace(e.recover, ipc=ipc, **recover),
    )
    return batch_layout(e)


PAINTS = {"maker": "generate", "batch_order": "class_major"}


@pytest.mark.parametrize(
    ("classes", "ipc", "recover", "expected"),
    [
        (10, 10, {}, Layout(slots=1, classes=10, groups=10, blocks=1, total=10)),
        (10, 10, {"slots_per_batch": 5}, Layout(5, 10, 2, 1, 10)),
        (10, 10, {"batch_size": 5}, Layout(1, 5, 10, 2, 10)),
        (10, 10, {"batch_size": 10, "slots_per_batch": 5}, Layout(5, 2, 2, 5, 10)),
        (10, 4, {"batch_order": "class_major"}, Layout(4, 10, 1, 1, 10)),
        (10, 4, {"batch_order": "class_major", "batch_size": 8}, Layout(4, 2, 1, 5, 10)),
        (10, 10, {"batch_size": 3}, Layout(1, 3, 10, 4, 10)),  # 3, 3, 2 and 2 classes
        (1000, 10, {"batch_size": 100}, Layout(1, 100, 10, 10, 1000)),
        (1000, 10, {}, Layout(1, 100, 10, 10, 1000)),
        (200, 1, {}, Layout(1, 100, 1, 2, 200)),
        (102, 1, {}, Layout(1, 51, 1, 2, 102)),  # at most 100, in equal blocks
        (97, 1, {}, Layout(1, 97, 1, 1, 97)),
        # Equal blocks would hold one class: 51 and 50; 86, 86 and 85; 100 and three of 99.
        (101, 1, {}, Layout(1, 51, 1, 2, 101)),
        (257, 1, {}, Layout(1, 86, 1, 3, 257)),
        (397, 1, {}, Layout(1, 100, 1, 4, 397)),
        (1001, 1, {"batch_size": 100}, Layout(1, 91, 1, 11, 1001)),
        # A generator finishes about a hundred images of whole classes together.
        (1000, 10, PAINTS, Layout(10, 10, 1, 100, 1000)),
        (1000, 30, PAINTS, Layout(30, 4, 1, 250, 1000)),
        (1000, 1, PAINTS, Layout(1, 100, 1, 10, 1000)),
        (10, 50, PAINTS, Layout(50, 2, 1, 5, 10)),
        (10, 200, PAINTS, Layout(200, 1, 1, 10, 10)),
        (10, 4, {"maker": "generate"}, Layout(1, 10, 4, 1, 10)),
    ],
)
def test_the_layout_of_batches(classes, ipc, recover, expected):
    found = layout(classes, ipc, **recover)
    assert found == expected
    assert found.slots * found.groups == ipc
    blocks = [list(found.block(i)) for i in range(found.blocks)]
    assert sum(blocks, []) == list(range(classes))
    assert {found.slots * len(block) for block in blocks} == set(found.sizes)
    assert max(found.sizes) - min(found.sizes) <= found.slots


@pytest.mark.parametrize(
    "recover",
    [{"batch_size": 11}, {"slots_per_batch": 4}, {"batch_size": 5, "slots_per_batch": 2}],
)
def test_a_batch_that_does_not_divide_is_refused(recover):
    with pytest.raises(UserError, match="does not divide"):
        layout(10, 10, **recover)


def test_budgets():
    e = resolve(base.get_config())
    assert [budget_of(e, slot) for slot in range(10)] == [4000] * 10
    e = dataclasses.replace(e, recover=dataclasses.replace(e.recover, budget="mod8"))
    mod8 = [4000, 3500, 3000, 2500, 2000, 1500, 1000, 500, 4000, 3500]
    assert [budget_of(e, slot) for slot in range(10)] == mod8


def recover_fields(**recover):
    e = resolve(digits(10))
    e = dataclasses.replace(e, recover=dataclasses.replace(e.recover, **recover))
    return fingerprints.section(SimpleNamespace(config=e), "recover")


def test_a_later_field_enters_a_fingerprint_only_where_it_means_something_new():
    fields = recover_fields()
    for name, value in {
        "short_classes": "repeat", "targets": "groups", "inject_from": "retrieved",
        "inject_simplicity": 0.2,
    }.items():  # fmt: skip
        assert name not in fields
        assert recover_fields(**{name: value}) == {**fields, name: value}


def test_what_float32_becomes_enters_every_fingerprint_where_it_is_not_the_usual():
    e = resolve(digits(10))
    usual = fingerprints.section(SimpleNamespace(config=e), "validate")
    other = dataclasses.replace(e.parallel, matmul_precision="highest")
    context = SimpleNamespace(config=dataclasses.replace(e, parallel=other))
    found = {"matmul_precision": "highest"}
    for name in ("squeeze", "relabel", "validate"):
        assert fingerprints.section(context, name).items() >= found.items()
    assert fingerprints.section(context, "validate") == usual | found


def test_fields_that_change_no_bits_enter_no_fingerprint():
    fields = recover_fields
    assert fields(steps_per_dispatch=1, checkpoint_seconds=1.0, initialise_from="x") == fields()
    assert fields(keep_at=(1, 2)) == fields()
    for other in ({"iterations": 1}, {"pool": ("resnet18",)}, {"granularity": "per_batch"}):
        assert fields(**other) != fields()
