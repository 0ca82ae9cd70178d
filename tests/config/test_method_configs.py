"""Every method's config on every data set its papers give: it resolves, and says what they do."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pathlib
from types import SimpleNamespace

import pytest
from helpers.command import call

from configs.methods import cao2, recipes
from prism_jax import plan, synthesis
from prism_jax.analysis import summary
from prism_jax.config import Experiment, batch_layout, resolve
from prism_jax.config.generation import clustering_of
from prism_jax.config.rules.recover import one_draw
from prism_jax.config.sections import Refine
from prism_jax.diffusion.anchors import Clustering
from prism_jax.stages import analyse
from prism_jax.synthesis import start

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "methods"
METHODS = sorted(p.stem for p in FOLDER.glob("*.py") if "def get_config" in p.read_text())
IPCS = (1, 10, 50)
PROTOCOL = summary.SCHEMA["properties"]["protocol"]


def experiment(name: str, *words: str) -> Experiment:
    module = importlib.import_module(f"configs.methods.{name}")
    return resolve(module.get_config(",".join(words)))


# Where the word `official` has no meaning, and what is said then.
NOT_OFFICIAL = {
    "prism": "configs/methods/prism_official.py",
    "prism_official": "this is what the released code does",
    "prism_selection": "not released",
    "ddoq": "all its defects mended",
    ("mgd3", "digits"): "of DiT-XL/2",
    ("cao2", "digits"): "of DiT-XL/2",
}


def in_no_paper(name: str) -> bool:
    """Whether a method is somebody's own, as its docstring says."""
    return "in no paper" in (importlib.import_module(f"configs.methods.{name}").__doc__ or "")


def not_official(name: str, dataset: str) -> str | None:
    if in_no_paper(name):
        return "no released code"
    return NOT_OFFICIAL.get(name, NOT_OFFICIAL.get((name, dataset)))


def recipes_of(name: str) -> list[str]:
    """The data sets for which a method has a recipe."""
    found = []
    for dataset in recipes.DATASETS:
        try:
            experiment(name, dataset)
        except ValueError as error:
            assert f"no recipe for {dataset}" in str(error)
        else:
            found.append(dataset)
    return found


def test_there_is_a_config_for_every_method():
    assert set(synthesis.METHODS) <= set(METHODS)


def test_recipes_know_what_a_teacher_is_asked_for():
    assert set(recipes.ASKING) == set(start.ASKING), "configs/methods/recipes.py: ASKING"


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_resolves_and_plans_with_every_word(name, capsys):
    found, names = recipes_of(name), set()
    assert "digits" in found, "every method has a small recipe, which tests and laptops run"
    assert "imagenet" in found or in_no_paper(name)
    for dataset, ipc in itertools.product(found, IPCS):
        for words in ((), ("official",), ("smoke",))[: 3 if dataset == "imagenet" else 2]:
            if words == ("official",) and not_official(name, dataset):
                continue
            e = experiment(name, dataset, f"ipc{ipc}", *words)
            assert e.recover.ipc == (min(ipc, 2) if words == ("smoke",) else ipc)
            assert e.dataset.name == dataset and e.name not in names
            names.add(e.name)
            assert e.recover.method in (name, name.split("_")[0]) or in_no_paper(name)
            files = [e.network(t).checkpoint for t in e.squeeze.teachers]
            assert all(files) if dataset == "imagenet" else not any(files)
            plan.show(e, "run", measure=False)
            said = capsys.readouterr().out
            protocol = analyse.protocol(SimpleNamespace(config=e))
            assert not [*summary.violations(protocol, PROTOCOL, "summary.protocol")]
            assert e.name in said and f"{e.recover.ipc * e.dataset.num_classes:,} (" in said


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_resolves_at_ipcs_that_no_paper_has(name):
    """What the user did not give is not what is wrong with it."""
    for dataset, ipc in itertools.product(recipes_of(name), (3, 7, 30, 64, 110, 400)):
        assert experiment(name, dataset, f"ipc{ipc}").recover.ipc == ipc


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(synthesis.METHODS))
def test_the_real_command_plans_every_method(name):
    """Three dispatches of each on random weights: what recover and relabel take is measured."""
    file = FOLDER / f"{name}.py"
    status, out, err = call(f"--config={file}:digits,ipc2,quick", "--plan")
    assert status == 0, err
    generates = name in ("d4m", "ddoq", "mgd3", "cao2")
    optimises = name != "rded" and not generates
    assert "relabel takes" in out and ("recover takes" in out) == optimises
    assert ("generator takes" in out) == ("generate takes" in out) == generates


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_has_paper_and_command(name):
    module = importlib.import_module(f"configs.methods.{name}")
    command = f"python -m prism_jax.main --config=configs/methods/{name}.py"
    assert command in module.__doc__
    if "_" not in name and not in_no_paper(name):
        assert "Paper: arXiv" in module.__doc__ and "Reports" in module.__doc__, (
            f"the docstring of configs/methods/{name}.py names the paper (Paper: arXiv ...) and "
            f"what it Reports, or says that the method is in no paper"
        )


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("imagenet,cifar10", "allowed: one of"),
        ("ipc0", "allowed"),
        ("offcial", "official"),
        ("ipcs", "ipc<number>"),
        ("cifar10,smoke", "smoke"),
        ("imagenet,quick", "digits"),
    ],  # fmt: skip
)
def test_unknown_words_are_refused(argument, said):
    with pytest.raises(ValueError, match=said):
        experiment("sre2l", *argument.split(","))


def fields(name: str, dataset: str, *words: str) -> dict:
    e = experiment(name, dataset, *words)
    return {f"{s}.{k}": v for s in ("recover", "relabel", "validate", "squeeze", "generate")
            for k, v in vars(getattr(e, s)).items()}  # fmt: skip


# What the papers and their code say, method by method; `methods.md` of the sheets.
STATED = {
    ("sre2l", "imagenet"): {
        "recover.initialise": "noise", "recover.learning_rate": 0.25, "recover.alpha_bn": 0.01,
        "recover.iterations": 4000, "recover.roll": 32, "recover.batch_size": 100,
        "relabel.crop_min": 0.08, "validate.loss": "kl", "validate.temperature": 20.0,
        "validate.batch_size": 1024, "validate.schedule": "cosine",
    },
    ("sre2l", "cifar100"): {
        "recover.iterations": 1000, "recover.crop_min": 1.0, "recover.flip": False,
        "recover.roll": 4, "relabel.mix": "mixup", "validate.temperature": 30.0,
        "validate.epochs": 400, "relabel.teacher_mode": "eval",
    },
    ("sre2l", "tiny_imagenet"): {
        "recover.alpha_bn": 1.0, "recover.learning_rate": 0.1, "recover.roll_centred": True,
        "recover.roll": 4, "recover.crop_min": 0.08, "validate.epochs": 100,
        "validate.batch_size": 256, "validate.optimiser": "sgd", "validate.decay": "all",
    },
    ("cda", "tiny_imagenet"): {
        "recover.learning_rate": 0.4, "recover.alpha_bn": 0.05, "recover.crop_curriculum": "cosine",
        "recover.crop_milestone": 1.0, "recover.roll_centred": False, "validate.epochs": 100,
    },
    ("dwa", "tiny_imagenet"): {
        "recover.batch_size": 200, "validate.epochs": 200, "validate.batch_size": 64,
        "validate.warmup_start": 0.01, "validate.decay": "all", "validate.loss": "kl_t2",
    },
    ("dwa", "imagenet"): {
        "recover.perturb_rho": 0.015, "recover.perturb_steps": 15, "recover.variance_weight": 2.0,
        "recover.iterations": 2000, "recover.initialise": "real_squashed",
        "recover.perturb_accumulates": False, "validate.batch_size": 128,
    },
    ("dwa", "cifar10"): {
        "recover.perturb_steps": 12, "recover.variance_weight": 11.0, "recover.iterations": 1000,
    },
    ("gvbsm", "imagenet"): {
        "recover.ema": 0.4, "recover.drop": 0.0, "recover.statistic_patch": 16,
        "recover.match": ("bn", "conv", "patch"), "recover.learning_rate": 0.1,
        "recover.densification": 1.0, "recover.batch_size": 80, "recover.first_layer": "bn",
        "recover.batch_order": "class_major", "relabel.ensemble": "norm_mean",
        "validate.loss": "mse_gt", "validate.ce_weight": 0.1,
    },
    ("gvbsm", "cifar100"): {
        "recover.ema": 0.8, "recover.drop": 0.4, "recover.statistic_patch": 4,
        "recover.crop_pad": 4, "recover.roll": 32, "recover.learning_rate": 0.05,
        "validate.ce_weight": 0.15, "validate.optimiser": "sgd", "validate.epochs": 1000,
        "squeeze.weight_decay": 0.0, "relabel.ensemble": "mean",
    },
    ("gvbsm", "cifar10"): {
        "recover.batch_size": 100, "squeeze.epochs": 5, "validate.weight_decay": 0.0,
    },
    ("gvbsm", "tiny_imagenet", "ipc50"): {
        "recover.batch_size": 100, "recover.slots_per_batch": 5, "recover.densification": 1.0,
        "squeeze.schedule": "cosine", "validate.accumulate": 2,
    },
    ("gvbsm", "tiny_imagenet", "ipc30"): {
        "recover.batch_size": 99, "recover.slots_per_batch": 3, "recover.densification": 1.0,
    },
    ("gvbsm", "tiny_imagenet"): {"recover.slots_per_batch": 1, "recover.densification": 0.0},
    ("edc", "cifar100"): {
        "squeeze.epochs": 50, "squeeze.learning_rate": 0.05, "squeeze.weight_decay": 0.0,
        "squeeze.batch_size": 64, "recover.batch_size": 100, "validate.momentum": 0.875,
        "recover.initialise": "mosaic", "recover.patch_factor": 1, "recover.scorer": "resnet18",
        "recover.patch_images": 300, "recover.patch_choice": "confident", "recover.flatness": 0.0,
    },
    ("edc", "tiny_imagenet"): {
        "recover.initialise": "mosaic", "recover.patch_factor": 1, "recover.scorer": "resnet18",
    },
    ("edc", "cifar10"): {"recover.initialise": "real_random"},
    ("edc", "imagenet"): {
        "recover.class_share": 0.5, "recover.ema": 0.8, "recover.alpha_bn": 0.1,
        "recover.iterations": 1000, "recover.crop_min": 0.5, "recover.roll": 0,
        "recover.initialise": "mosaic_shuffled", "recover.densification": 0.0,
        "recover.learning_rate": 0.05, "validate.ce_weight": 0.025, "validate.ema": 0.99,
        "validate.schedule": "half_cosine", "relabel.crop_min": 0.5, "validate.batch_size": 100,
    },
    ("rded", "imagenet"): {
        "recover.iterations": 0, "recover.patch_factor": 2, "recover.patch_images": 300,
        "recover.batch_size": None,
        "recover.patch_crops": 5, "recover.patch_choice": "confident", "relabel.crop_min": 0.5,
        "relabel.patch_shuffle": 2, "validate.schedule": "half_cosine",
        "validate.batch_size": 100, "relabel.mode": "online",
    },
    ("rded", "tiny_imagenet"): {
        "recover.patch_factor": 1, "relabel.crop_min": 1.0, "relabel.patch_shuffle": 1,
        "validate.batch_size": 100,
    },
    ("delt", "imagenet"): {
        "recover.budget": "early_late", "recover.rounds": 8, "recover.iterations": 4000,
        "recover.roll": 0, "recover.crop_curriculum": "cosine", "recover.batch_size": 100,
        "recover.initialise": "real_median", "recover.learning_rate": 0.25,
        "relabel.crop_min": 0.25,
    },
    ("cvdd", "imagenet"): {
        "recover.committee": "listed", "recover.priors": (56.4, 42.3, 52.5, 44.2, 40.6),
        "recover.prior_temperature": 5.0, "relabel.prior_temperature": 10.0,
        "relabel.ensemble": "committee", "relabel.teacher_mode": "train", "relabel.bn_group": 8,
        "relabel.batch_size": 16, "validate.accumulate": 2, "validate.zeta": 2.0,
        "recover.patch_factor": 1, "recover.patch_choice": "median",
    },
    ("cvdd", "imagenet", "ipc50"): {"validate.zeta": 1.0},
    ("cvdd", "imagenet", "ipc100"): {"validate.zeta": 2.0},
    ("cvdd", "tiny_imagenet"): {"validate.zeta": 1.0},
    ("cvdd", "tiny_imagenet", "ipc50"): {"validate.zeta": 2.0},
    ("cvdd", "tiny_imagenet", "ipc100"): {"validate.zeta": 2.0},
    ("cvdd", "cifar100"): {"validate.zeta": 2.0},
    ("cvdd", "cifar100", "ipc100"): {"validate.zeta": 1.0},
    ("cvdd", "digits"): {"validate.zeta": 1.0},
    ("cvdd", "cifar10"): {"relabel.batch_size": 16, "relabel.bn_group": 8},
    ("fadrm", "tiny_imagenet"): {"validate.zeta": 2.0, "relabel.bn_group": 8},
    ("fadrm", "tiny_imagenet", "ipc50"): {"validate.zeta": 1.0},
    ("fadrm", "cifar100", "ipc1"): {
        "validate.zeta": 2.0, "validate.learning_rate": 5e-4, "validate.epochs": 1000,
    },
    ("rded", "imagenet", "ipc50"): {"recover.batch_size": 50, "recover.patch_images": 300},
    ("rded", "imagenet", "ipc100"): {"recover.batch_size": 100, "recover.patch_images": 600},
    ("prism_official", "imagenet", "ipc1"): {
        "recover.granularity": "per_slot", "validate.accumulate": 2, "recover.jpeg_quality": 75,
    },
    ("fadrm", "imagenet"): {
        "recover.phase_sizes": (200, 224, 200, 224), "recover.inject": 0.5,
        "recover.iterations": 2000, "recover.round_robin_restarts": True,
        "relabel.ensemble": "mean", "relabel.bn_group": 8,
    },
    ("psm", "imagenet"): {
        "recover.pool": ("resnet18", "densenet121", "shufflenet_v2_x1_0", "mobilenet_v2"),
        "recover.phase_sizes": (200, 224, 200, 224), "recover.inject": 0.5,
        "recover.targets": "groups", "recover.initialise": "real_group_hardest",
        "relabel.ensemble": "mean", "relabel.bn_group": 8, "validate.epochs": 300,
    },
    ("psm", "imagenet", "imagenette"): {"recover.initialise": "real_group_easiest"},
    ("psm", "imagenet", "ipc1"): {"recover.count_no_bn": False, "recover.targets": "groups"},
    ("psm", "cifar10"): {
        "recover.phase_sizes": (32, 32, 32, 32), "validate.epochs": 1000, "relabel.epochs": 1000,
    },
    ("psm", "tiny_imagenet", "ipc1"): {"validate.epochs": 1000},
    ("psm", "tiny_imagenet"): {"validate.epochs": 300},
    ("prism_plus", "cifar10"): {
        "recover.initialise": "real_confident", "recover.learning_rate": 0.01,
        "recover.iterations": 250, "relabel.ensemble": "mean", "recover.logits_by": None,
        "recover.total_variation": 0.002,
    },
    ("d4m", "imagenet"): {
        "generate.generator": "stable_diffusion", "generate.image_size": 512,
        "generate.view": "squashed", "generate.sampler": "pndm", "generate.steps": 50,
        "generate.strength": 0.7, "generate.guidance": 8.0, "generate.eta": 0.0,
        "generate.negative": "cartoon, anime, painting", "generate.weighted": False,
        "relabel.crop_min": 0.08, "relabel.mix": "cutmix", "relabel.batch_size": 1024,
        "validate.loss": "kl", "validate.temperature": 20.0, "validate.learning_rate": 1e-3,
        "validate.weight_decay": 0.01, "validate.schedule": "cosine", "validate.accumulate": 2,
    },
    ("d4m", "cifar100", "ipc50"): {
        "generate.generator": "stable_diffusion", "generate.image_size": 512,
        "generate.strength": 0.7, "generate.guidance": 8.0, "generate.class_names": None,
        "generate.template": "a photo of a {}", "relabel.mix": "mixup",
        "validate.temperature": 30.0, "validate.epochs": 400,
    },
    ("d4m", "tiny_imagenet"): {
        "generate.class_names": "data/tiny_imagenet_names.txt", "generate.sampler": "pndm",
        "validate.epochs": 100, "validate.optimiser": "sgd",
    },
    ("ddoq", "imagenet"): {"generate.weighted": True, "generate.strength": 0.7},
    ("mgd3", "imagenet"): {
        "generate.generator": "dit_released", "generate.image_size": 256,
        "generate.sampler": "ddpm", "generate.steps": 50, "generate.strength": 1.0,
        "generate.guidance": 4.0, "generate.variance": "learned", "generate.flip": True,
        "generate.sampled": False, "generate.anchors": "kmeans", "generate.mode_weight": 0.1,
        "generate.mode_window": (26, 49), "validate.loss": "ce",
    },
    ("cao2", "imagenet"): {
        "generate.sampler": "ddpm", "generate.guidance": 2.7, "generate.candidates": 4,
        "generate.judge": "resnet18", "generate.anchors": "none", "generate.strength": 1.0,
        "validate.schedule": "half_cosine", "generate.refine": Refine(100, 6e-4, 10.0, (1, 11)),
        "relabel.crop_min": 0.5, "relabel.patch_shuffle": 2,
    },
    ("cao2", "digits"): {
        "generate.candidates": 2, "relabel.crop_min": 1.0, "relabel.patch_shuffle": 1,
    },
    ("prism", "imagenet"): {
        "recover.learning_rate": 0.05, "recover.initialise": "real", "recover.iterations": 4000,
        "relabel.crop_min": 0.25, "validate.loss": "mse_gt", "validate.ce_weight": 0.1,
        "validate.schedule": "cos2", "validate.batch_size": 50, "validate.accumulate": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given"),
    [("d4m", {"imagenet", "tiny_imagenet", "cifar100", "cifar10", "digits"})]
    + [(name, {"imagenet", "digits"}) for name in ("mgd3", "ddoq", "cao2")],
)
def test_a_generator_has_the_recipes_of_its_paper(name, given):
    """What no paper gives is refused, with what there is."""
    assert set(recipes_of(name)) == given
    for dataset in {*recipes.DATASETS} - given:
        with pytest.raises(ValueError, match=f"{name} has no recipe for {dataset}.*give imagenet"):
            experiment(name, dataset)


def test_the_released_d4m_is_that_of_the_notes():
    """Every defect by its flag, and what they are in the engine's words."""
    e = experiment("d4m", "imagenet", "official")
    assert clustering_of(e.generate) == Clustering("chunked_released", expand=1)
    assert e.generate.sampled and e.generate.slip and e.generate.template == "{}"
    page = (FOLDER.parents[1] / "docs" / "presets.md").read_text().split("## D4M as released")[1]
    for flag in BROUGHT_BACK["d4m", "imagenet"]:
        assert f"`generate.{flag}" in page, flag


@pytest.mark.parametrize("at", STATED, ids=" ".join)
def test_recipes_say_what_the_papers_do(at):
    found = fields(*at)
    assert {key: found[key] for key in STATED[at]} == STATED[at]


def test_prism_is_the_plain_configs_experiment():
    """configs/imagenet_ipc10.py and configs/methods/prism.py are one experiment by two names."""
    for ipc, words in ((1, ""), (10, ""), (50, ""), (10, "official"), (1, "official")):
        module = importlib.import_module(f"configs.imagenet_ipc{ipc}")
        plain = resolve(module.get_config(words))
        name = "prism_official" if words else "prism"
        here = experiment(name, "imagenet", f"ipc{ipc}")
        for section in ("dataset", "recover", "relabel", "validate"):
            mine, theirs = vars(getattr(here, section)), vars(getattr(plain, section))
            assert mine == theirs, section
        assert set(here.squeeze.teachers) == set(plain.squeeze.teachers)


# The word `official` brings a defect back, and nothing else changes.
BROUGHT_BACK = {
    ("gvbsm", "imagenet"): {
        "first_layer", "ema_from_zero", "rounding", "jpeg_quality", "batch_size",
    },
    ("edc", "imagenet"): {
        "first_layer", "ema_from_zero", "class_patch_swapped", "rounding", "jpeg_quality",
        "schedule", "ema_statistics", "batch_size",
    },
    ("edc", "tiny_imagenet"): {
        "first_layer", "ema_from_zero", "class_patch_swapped", "rounding", "ema_statistics",
    },
    ("dwa", "imagenet"): {"perturb_accumulates", "perturb_probes", "rounding", "jpeg_quality"},
    ("dwa", "cifar10"): {
        "perturb_accumulates", "perturb_probes", "rounding", "jpeg_quality", "teacher_mode",
    },
    ("sre2l", "imagenet"): {"rounding", "jpeg_quality"},
    ("d4m", "imagenet"): {"anchors", "expand", "sampled", "slip", "template"},
    ("d4m", "cifar10"): {"anchors", "expand", "sampled", "slip", "template"},
    ("d4m", "digits"): {"anchors", "expand"},
    ("mgd3", "imagenet"): {"guided_channels"},
}  # fmt: skip


@pytest.mark.parametrize("at", BROUGHT_BACK, ids=" ".join)
def test_official_brings_the_mended_defects_back(at):
    mended, released = fields(*at), fields(*at, "official")
    changed = {key.split(".")[1] for key in mended if mended[key] != released[key]}
    assert changed == BROUGHT_BACK[at]


@pytest.mark.parametrize("name", METHODS)
def test_official_changes_something_or_is_refused(name):
    """A run that is named official does what was released, or there is no such run."""
    for dataset in recipes_of(name):
        if why := not_official(name, dataset):
            with pytest.raises(ValueError, match=f"leave out official: .*{why}"):
                experiment(name, dataset, "official")
        else:
            assert fields(name, dataset) != fields(name, dataset, "official"), dataset


def test_ten_classes_of_imagenet_are_ten_when_methods_ask():
    """CaO2 has half the candidates for ten classes, RDED's students half the batch."""
    small = resolve(cao2.get_config("imagenet,imagenette"))
    assert (small.generate.candidates, small.validate.batch_size) == (2, 50)
    large = resolve(cao2.get_config("imagenet"))
    assert (large.generate.candidates, large.validate.batch_size) == (4, 100)


@pytest.mark.parametrize(
    ("name", "words", "size"),
    [
        ("gvbsm", ("ipc50",), 50), ("edc", ("ipc50",), 50), ("delt", ("ipc50",), 100),
        ("gvbsm", ("ipc10", "official"), 40), ("edc", ("ipc10", "official"), 20),
    ],
)  # fmt: skip
def test_batches_of_ten_classes_are_those_of_a_thousand(name, words, size):
    """Their statistics are of as many images of as many classes."""
    for more in ((), ("imagenette",)):
        assert batch_layout(experiment(name, "imagenet", *words, *more)).size == size
    assert batch_layout(experiment("prism", "imagenet", "imagenette")).size == 10  # of 100


def test_one_draw_for_all_images_is_said():
    def said(name, **fields):
        e = experiment(name, "imagenet")
        e = dataclasses.replace(e, recover=dataclasses.replace(e.recover, **fields))
        return one_draw(e, batch_layout(e))

    assert said("prism") is None  # a draw for each slot
    assert "share one draw of teachers" in said("prism", batch_order="class_major")
    assert said("prism", batch_order="class_major", granularity="per_iteration") is None
    assert said("sre2l", batch_order="class_major") is None
