"""What the stages are handed of the data: teachers' outputs, normalisation, damaged images."""

from __future__ import annotations

import dataclasses
import json
import shlex
from types import SimpleNamespace

import pytest
from etils import epath
from helpers.command import TINY, call
from helpers.images import encoded, write_tree

from configs import tiny
from prism_jax import plan
from prism_jax.config import Network, resolve
from prism_jax.data import workdir
from prism_jax.data.sources import open_source
from prism_jax.errors import UserError
from prism_jax.stages import analyse, fingerprints
from prism_jax.stages import squeeze as squeezing
from prism_jax.stages.context import Context
from prism_jax.stages.coordination import StopSignal, Work
from prism_jax.tools.teachers.arguments import parser

pytestmark = pytest.mark.filterwarnings("ignore:.*classes of imagenet:UserWarning")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def context(path, *, network=None, **dataset) -> Context:
    """A run on a folder, with a network "big" of a head of 1,000 classes."""
    experiment = resolve(tiny.get_config())
    fields = {"name": "imagenet", "source": "folder", "path": str(path), "num_classes": 2}
    return Context(
        dataclasses.replace(
            experiment,
            dataset=dataclasses.replace(experiment.dataset, **fields | dataset),
            networks={"big": network or Network("resnet18", head_classes=1000)},
        ),
        path / "run",
    )


def test_a_head_of_imagenet_is_cut_to_the_classes_of_the_folders(tmp_path):
    wnids = ("n01443537", "n02102040", "n15075141")
    root = write_tree(tmp_path / "a", classes=wnids)
    assert context(root, num_classes=3).networks.class_indices("big") == (1, 217, 999)
    assert context(root).networks.class_indices("big") == (1, 217)  # the first two of them
    background = Network("resnet18", head_classes=1001)
    assert context(root, network=background).networks.class_indices("big") == (2, 218)
    stated = Network("resnet18", head_classes=1000, class_indices=(7, 8))
    assert context(root, network=stated).networks.class_indices("big") == (7, 8)
    own = Network("resnet18", head_classes=2)
    assert context(root, network=own).networks.class_indices("big") is None


def test_a_teacher_is_another_one_only_where_a_key_is_stated(tmp_path):
    """Fingerprints from before there were keys still fit."""
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"weights")
    fields = {
        key: fingerprints.teacher(
            context(
                tmp_path, network=Network("resnet18", checkpoint=str(weights), weights_key=key)
            ),
            "big",
        )
        for key in (None, "model")
    }
    assert "weights_key" not in fields[None]["network"]
    assert fields["model"]["network"] == {**fields[None]["network"], "weights_key": "model"}


def test_classes_that_nobody_knows_have_to_be_stated(tmp_path):
    unknown = context(write_tree(tmp_path / "a", classes=("cat", "dog")))
    with pytest.raises(UserError, match="head of 1000 classes.*networks.big.class_indices"):
        unknown.networks.class_indices("big")
    root = write_tree(tmp_path / "b", classes=("n01443537", "n02102040"))
    with pytest.raises(UserError, match="head of 21843 classes"):
        context(root, network=Network("resnet18", head_classes=21843)).networks.class_indices("big")


def test_what_is_missing_is_said_before_any_work(tmp_path):
    known = context(write_tree(tmp_path / "a", classes=("cat", "dog"))).config
    teachers = dataclasses.replace(known.squeeze, teachers=("big",))
    found = plan.missing(dataclasses.replace(known, squeeze=teachers), "run")
    assert len(found) == 1 and found[0].startswith("teacher big: big has a head of 1000 classes")
    nowhere = dataclasses.replace(known.dataset, path=str(tmp_path / "nowhere"))
    (line,) = plan.missing(dataclasses.replace(known, dataset=nowhere), "run")
    assert line.startswith(f"images (train, test): there is no {tmp_path / 'nowhere'}")


def test_a_stated_normalisation_is_used_and_enters_what_the_data_is(tmp_path):
    root = write_tree(tmp_path)
    plain = context(root)
    stated = context(root, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    assert plain.inputs.normalisation.mean == (0.485, 0.456, 0.406)
    assert stated.inputs.normalisation.std == (0.5, 0.25, 0.5)
    fields = [c.inputs.fields(c.inputs.open("train")) for c in (plain, stated)]
    assert fields[0] != fields[1] and fields[0] == plain.inputs.open("train").describe()
    # As what is stored is read: a page compares the two, and refused every run of such images.
    assert json.loads(json.dumps(fields[1])) == fields[1]
    with pytest.raises(UserError, match="dataset.mean has 1 numbers; imagenet has 3 channels"):
        _ = context(root, mean=(0.5,), std=(0.5,)).inputs.normalisation


def test_the_summary_counts_what_is_left_out(tmp_path):
    root = write_tree(tmp_path)
    (root / "val" / "n01" / "img_1.png").write_bytes(b"no image")
    provenance = {"command": "", "commit": None, "versions": {}, "machine": {}}
    found = analyse.summarise(context(root, damaged="skip"), {}, provenance)["dataset"]
    assert found["left_out"] == {"train": 0, "test": 1}
    assert (found["train_images"], found["test_images"]) == (6, 5)


# --- the real command on damaged images ---


@pytest.fixture
def digits(tmp_path):
    """Scikit-learn's digits as a folder of PNG files, one of them damaged."""
    root = tmp_path / "digits"
    for split, ours in (("train", "train"), ("test", "test")):
        source = open_source(name="digits", source="sklearn", path=None, split=split, image_size=8)
        for i in range(len(source)):
            path = root / ours / str(source.labels_N[i]) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(source.image(i)[..., 0]))
    path = root / "train" / "1" / sorted(p.name for p in (root / "train" / "1").iterdir())[3]
    path.write_bytes(path.read_bytes()[:50])
    return root, path


def squeeze(root, workdir, *arguments):
    dataset = {"source": "folder", "path": root}
    return call(
        TINY, f"--workdir={workdir}", "--stages=squeeze",
        *(f"--config.dataset.{k}={v}" for k, v in dataset.items()), *arguments,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_the_run_with_its_name(digits, tmp_path, workers):
    root, damaged = digits
    status, out, err = squeeze(root, tmp_path / "run", f"--config.dataset.workers={workers}")
    assert status == 2
    assert f"{damaged} is not a readable image" in err and "dataset.damaged=skip" in err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_a_damaged_image_is_left_out_of_the_run_and_reported(digits, tmp_path):
    root, damaged = digits
    source = open_source(name="digits", source="sklearn", path=None, split="train", image_size=8)
    whole, weights = int((source.labels_N < 4).sum()), []  # the tiny experiment has four classes
    for name, arguments in {
        "threads": ["--config.dataset.damaged=skip"],
        "workers": ["--config.dataset.damaged=skip", "--config.dataset.workers=2"],
        "without the file": [],
    }.items():
        if not arguments:
            damaged.unlink()
        status, out, err = squeeze(root, tmp_path / name, *arguments)
        assert status == 0, err
        assert out.count(f"damaged, left out: {damaged}") == bool(arguments)
        summary = json.loads((tmp_path / name / "summary.json").read_text())["dataset"]
        assert summary["left_out"]["train"] == bool(arguments)
        assert summary["train_images"] == whole - 1
        weights.append((tmp_path / name / "squeeze/first/weights.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


# --- what a teacher is worth ------------------------------------------------------------------


def test_chance_is_told_from_a_barely_trained_network():
    assert squeezing.least_top1(10) == pytest.approx(0.19)
    assert squeezing.least_top1(2) == pytest.approx(0.55)
    assert squeezing.least_top1(1000) == pytest.approx(0.005)


def test_the_command_that_tells_causes_apart_reads_as_the_run_does(tmp_path):
    network = Network(
        "resnet18", 0.5, 1.0, "small", "my weights.pth", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2),
        weights_key="ema", class_indices=(4, 0),
    )  # fmt: skip
    there = context(write_tree(tmp_path / "a b", classes=("cat", "dog")), network=network)
    words = shlex.split(squeezing._evaluation(there, network))
    assert words[:4] == ["python", "-m", "prism_jax.tools.teachers", "evaluate"]
    found = parser().parse_args(words[3:])
    assert (found.file, found.path) == ("my weights.pth", str(tmp_path / "a b"))
    assert found.image_size == there.config.dataset.image_size == 8
    assert (found.width, found.depth, found.stem, found.weights_key) == (0.5, 1.0, "small", "ema")
    assert (tuple(found.mean), tuple(found.class_indices)) == (network.mean, (4, 0))
    usual = Network("resnet18", checkpoint="w.pth")
    plain = context(tmp_path / "a b", network=usual, image_size=224)
    assert "--path=" in (said := squeezing._evaluation(plain, usual))
    assert not any(flag in said for flag in ("--image-size", "--width", "--stem", "--mean"))


@pytest.mark.parametrize("top1, warned", [(0.50, True), (0.66, False), (0.0, False)])
def test_weights_far_below_what_they_are_known_for_are_warned_of(tmp_path, capsys, top1, warned):
    """69.8 % of ImageNet for a ResNet-18; at chance the run stops, and says more."""
    wnids = ("n01443537", "n02102040", "n15075141")
    root = write_tree(tmp_path / "a", classes=wnids)
    known = Network("resnet18", head_classes=1000, checkpoint="weights.pth")
    squeezing._warn(context(root, network=known, num_classes=3), "big", top1)
    assert ("known for 69.8 %" in capsys.readouterr().out) == warned
    squeezing._warn(context(root, network=Network("resnet18"), num_classes=3), "big", top1)
    assert not capsys.readouterr().out  # nothing is known of what was trained here


def test_a_stage_may_lie_behind_a_link_on_a_larger_disk(tmp_path, capsys):
    root, folder = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "run" / "relabel")
    work = Work(root, SimpleNamespace(), StopSignal(), {})
    work.acquire = lambda: None
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "relabel").symlink_to(tmp_path / "large")
    for teachers in ("a", "b"):  # made behind it, and made again
        work.begin(folder, {"teachers": teachers})
        (folder / f"labels of {teachers}").write_bytes(b"")
        there = sorted(path.name for path in (tmp_path / "large").iterdir())
        assert there == ["fingerprint.json", f"labels of {teachers}"]
    assert "made from other settings" in capsys.readouterr().out
    assert [path.name for path in root.iterdir()] == ["relabel"]


def test_the_summary_of_other_settings_goes_before_work_begins(tmp_path):
    """An export or a page of a run that was stopped would show them as the new ones' accuracy."""
    experiment = resolve(tiny.get_config())
    more = dataclasses.replace(experiment, seed=1)
    summary = tmp_path / workdir.SUMMARY

    def begin(config):
        work = Work(epath.Path(tmp_path), config, StopSignal(), {"machine": {}})
        try:
            work.acquire()
        finally:
            work.lock.release()

    begin(experiment)
    summary.write_text("{}")
    begin(experiment)
    assert summary.exists()
    begin(more)
    assert not summary.exists()
    # A teacher of the same settings but other weights: what it made is made anew.
    summary.write_text("{}")
    folder = epath.Path(tmp_path / "relabel")
    workdir.write_fingerprint(folder, {"teachers": "a"})
    work = Work(epath.Path(tmp_path), more, StopSignal(), {"machine": {}})
    try:
        work.begin(folder, {"teachers": "a"})
        assert summary.exists()
        work.begin(folder, {"teachers": "b"})
        assert not summary.exists()
    finally:
        work.lock.release()


@pytest.mark.parametrize(
    ("lines", "indices", "stored", "expected"),
    [
        (1000, (5, 2, 7, 9), 4, [5, 2, 7, 9]),  # ImageNet's, of which these four are here
        (4, (5, 2, 7, 9), 4, [0, 1, 2, 3]),  # in the order of the labels
        (20, None, 20, [0, 1, 2, 3]),  # the first four of a set of twenty
        (1000, None, 4, None),
        (3, None, 4, None),
    ],
)
def test_names_are_those_of_the_classes_that_are_there(
    tmp_path, monkeypatch, lines, indices, stored, expected
):
    (tmp_path / "names.txt").write_text("\n".join(f"name {k}" for k in range(lines)) + "\n\n")
    c = tiny.get_config()
    c.generate.class_names = str(tmp_path / "names.txt")
    inputs = Context(resolve(c), tmp_path / "run").inputs
    source = SimpleNamespace(imagenet_indices=indices, num_classes=stored)
    monkeypatch.setattr(inputs, "open", lambda split: source)
    monkeypatch.setattr(inputs, "_whole", lambda split: source)
    if expected is None:
        with pytest.raises(UserError, match=f"has {lines} names for 4 classes"):
            inputs.spoken_names  # noqa: B018
    else:
        assert inputs.spoken_names == [f"name {k}" for k in expected]


def test_what_only_the_training_images_say_is_in_what_is_made_of_a_set_of_others(tmp_path):
    """Which outputs of an imported head are the classes, and which images are put in between."""
    (tmp_path / "big.safetensors").write_bytes(b"of somebody else")
    network = Network("resnet18", head_classes=1000, checkpoint=str(tmp_path / "big.safetensors"))
    first, second = (
        write_tree(tmp_path / name, classes=(wnid, "n15075141"))
        for name, wnid in (("a", "n01443537"), ("b", "n02102040"))
    )
    given = write_tree(tmp_path / "set", splits=("",), classes=("00000", "00001"))

    def fields(root, **recover):
        run = context(root, network=network)
        changed = {
            "initialise": "folder", "initialise_from": str(given), "ipc": 3, "pool": ("big",),
            "primary": "big", "iterations": 0, **recover,
        }  # fmt: skip
        experiment = dataclasses.replace(
            run.config,
            recover=dataclasses.replace(run.config.recover, **changed),
            relabel=dataclasses.replace(run.config.relabel, teachers=("big",)),
        )
        run = Context(experiment, root / "run")
        made = fingerprints.recover(run)
        labelled = SimpleNamespace(fields=made, labels_N=[0] * 6, name="synthetic")
        return made, fingerprints.relabel(run, labelled)

    copied, labels = zip(fields(first), fields(second), strict=True)
    assert copied[0] == copied[1] and "outputs" not in copied[0]  # no head is read for them
    assert labels[0]["outputs"] != labels[1]["outputs"]
    steps = {"iterations": 8, "phase_sizes": (8, 16), "inject": 0.5}
    optimised = [fields(root, **steps)[0] for root in (first, second)]
    assert optimised[0]["outputs"] != optimised[1]["outputs"]
    retrieved = [fields(r, **steps, inject_from="retrieved")[0] for r in (first, second)]
    assert retrieved[0]["retrieved"] != retrieved[1]["retrieved"]
    # Where recover begins with the training images, these say it.
    plain = fields(first, initialise="real_random", initialise_from=None)
    assert "outputs" not in plain[0] and "outputs" not in plain[1]


def test_devices_that_share_a_batch_are_in_what_is_optimised_alone(tmp_path):
    def fields(devices, **recover):
        experiment = resolve(tiny.get_config())
        shared = dataclasses.replace(experiment.parallel, recover_devices=devices)
        changed = dataclasses.replace(experiment.recover, **recover)
        run = dataclasses.replace(experiment, parallel=shared, recover=changed)
        return fingerprints.recover(Context(run, tmp_path / "run"))

    assert fields(2)["devices_per_batch"] == 2 and "devices_per_batch" not in fields(1)
    assert fields(2, iterations=0) == fields(1, iterations=0)
