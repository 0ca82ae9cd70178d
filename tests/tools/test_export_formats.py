"""A finished set in every format comes back to the same pixels and labels, here and elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
import types

import numpy as np
import pytest
from helpers.command import TINY, call, finished, reference
from PIL import Image

from prism_jax.core import schedules
from prism_jax.data import image_set, workdir
from prism_jax.data.datasets import DATASETS
from prism_jax.data.exchange import ImageSet
from prism_jax.data.label_store import LabelReader
from prism_jax.data.sets import dd_ranking, fkd
from prism_jax.data.sets.base import NOTHING_STATED, Stated
from prism_jax.data.sources import ArraySource, info_of, read_all
from prism_jax.labelling import drawn
from prism_jax.tools import export

__all__ = ["finished", "reference"]  # fixtures

DIGITS = DATASETS["digits"]
SPACE = Stated(DIGITS.normalisation.mean, DIGITS.normalisation.std)


@pytest.fixture
def made(reference, tmp_path, capsys):
    """Exports in a format, and gives the folder."""

    def make(form, *more):
        to = tmp_path / form
        arguments = (f"--workdir={reference}", f"--to={to}", f"--format={form}", *more)
        status = export.main(list(arguments))
        assert status == 0, capsys.readouterr().err
        return to

    return make


@pytest.fixture
def pixels(reference):
    return image_set.read_images(reference / "recover" / "images", 4, 2)[0]


@pytest.fixture
def mean_labels(reference):
    return export.mean_soft_labels(LabelReader(reference / "relabel"))


def opened(path, stated=NOTHING_STATED) -> ImageSet:
    real = ArraySource(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4), num_classes=4)
    return ImageSet(path, DIGITS, real, ipc=2, image_size=8, stated=stated)


def softmax(logits):
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("form", "file", "stated"),
    [
        ("folder", "", NOTHING_STATED),
        ("parquet", "", NOTHING_STATED),
        ("npz", "set.npz", NOTHING_STATED),
        ("dd_ranking", "", SPACE),
        ("fkd", "images", NOTHING_STATED),
    ],
)
def test_it_comes_back(made, pixels, mean_labels, form, file, stated):
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    folder = made(form)
    found = opened(folder / file, stated)
    images, labels = read_all(found, threads=1)
    np.testing.assert_array_equal(images, pixels)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    if form in ("parquet", "npz", "dd_ranking"):
        np.testing.assert_allclose(softmax(found.soft_NK), mean_labels, atol=1e-6)
    names = {entry["name"] for entry in json.loads((folder / "classes.json").read_text())}
    assert names == set("0123") and (folder / "provenance.json").exists()


def test_the_card_has_what_made_it_the_licence_and_the_controls(made, reference):
    summary = workdir.read_json(reference / "summary.json")
    text = (made("folder", "--licence=cc-by-4.0") / "README.md").read_text()
    assert "- labels: class folders alone" in text
    head, body = text.removeprefix("---\n").split("\n---\n")
    assert "license: cc-by-4.0" in head.splitlines()
    for name in ("synthetic", "random real, soft labels", "random real, hard labels"):
        assert f"| {name} | " in body
    top1 = 100 * summary["controls"]["full_real"]["outside"]["top1"]
    assert f"| full real training set | {top1:.1f}" in body
    assert "python -m prism_jax.main --config=" in body and "12 iterations" in body
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    assert yaml.safe_load(head)["tags"] == ["dataset-distillation"]


def test_a_run_that_is_not_validated_has_no_table(finished, tmp_path):
    (finished / "summary.json").unlink()
    export.export(finished, tmp_path / "set", form="folder")
    assert "Not validated" in (tmp_path / "set" / "README.md").read_text()


def test_datasets_reads_both_of_its_formats(made, pixels, mean_labels, tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    cache = str(tmp_path / "cache")
    folder = made("folder")
    kinds = {
        "folder": ("imagefolder", {"data_dir": str(folder)}),
        "parquet": (str(made("parquet")), {}),
    }
    for kind, (name, how) in kinds.items():
        rows = datasets.load_dataset(name, split="train", cache_dir=cache, **how)
        images = np.stack([np.array(row["image"]) for row in rows])
        np.testing.assert_array_equal(images, pixels[..., 0])
        assert rows["label"][:] == [0, 0, 1, 1, 2, 2, 3, 3]
        names = rows.features["label"].names
        assert names == (
            ["0", "1", "2", "3"] if kind == "parquet" else [f"{c:05d}" for c in range(4)]
        )
    np.testing.assert_allclose(rows["soft_label"][:], mean_labels)


def test_a_set_that_datasets_wrote_comes_in(pixels, tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    names = ["3", "1", "0", "2"]
    label = [names.index(str(c)) for c in np.repeat(np.arange(4), 2)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"image": [Image.fromarray(x[..., 0]) for x in pixels], "label": label}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "set.parquet")
    images, _ = read_all(opened(tmp_path / "set.parquet"), threads=1)
    np.testing.assert_array_equal(images, pixels)


def test_pytorch_reads_the_tensors_and_the_config_says_their_space(made, pixels, mean_labels):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    folder = made("dd_ranking")
    images, labels, rate = (torch.load(folder / f"{n}.pt") for n in ("images", "labels", "lr"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    norm = next(s["args"] for s in config["custom_val_trans"] if s["name"] == "Normalize")
    assert images.dtype == torch.float32 and images.shape == (8, 1, 8, 8)
    back = (images * norm["std"][0] + norm["mean"][0]) * 255
    np.testing.assert_array_equal(back.round().numpy()[:, 0], pixels[..., 0])
    np.testing.assert_allclose(labels.softmax(1), mean_labels, rtol=1e-5)
    ran = json.loads((folder / "provenance.json").read_text())["experiment"]["validate"]
    assert float(rate) == pytest.approx(ran["learning_rate"]) and rate.shape == ()
    assert (config["ipc"], config["num_epochs"], config["optimizer"]) == (2, 6, "adamw")
    assert config["soft_label_criterion"] == "kl" and config["soft_label_mode"] == "S"
    assert config["loss_fn_kwargs"] == {"temperature": 1.0, "scale_loss": False}
    assert config["weight_decay"] == 0.01 and config["lr_scheduler"] == "cosine"
    assert config["eval_full_data"] is True
    # Found beside the tensors, the config is the space that the import asks for.
    np.testing.assert_array_equal(read_all(opened(folder), threads=1)[0], pixels)


def test_fkd_has_every_label_view_and_mix(made, reference):
    folder = made("fkd")
    ours = LabelReader(reference / "relabel")
    labels = np.repeat(np.arange(4), 2)
    theirs = fkd.FkdLabels(str(folder), labels_N=labels, num_classes=4, image_size=8)
    assert len(theirs) == len(ours) == 12
    for record in theirs.read():
        same = ours[record.epoch * 2 + record.batch]
        np.testing.assert_array_equal(record.index_B, same.index_B)
        np.testing.assert_array_equal(record.logits_BK, same.logits_BK)
        view, mix = drawn(same, (8, 8), ours.manifest["view"])
        np.testing.assert_array_equal(record.shown[0].crop, view.crop)
        np.testing.assert_array_equal(record.shown[0].flip, view.flip)
        np.testing.assert_array_equal(record.shown[1].partner_B, mix.partner_B)
        np.testing.assert_array_equal(record.shown[1].box, np.tile(mix.box, (4, 1)))
        np.testing.assert_allclose(record.shown[1].weight, mix.weight, rtol=1e-6)


def test_pytorch_finds_each_batch_as_the_reference_does(made, reference):
    """Its sampler's first image leads to the file; six things are in it, of these types."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    folder = made("fkd")
    batches, order = torch.load(folder / fkd.BATCHES), torch.load(folder / fkd.ORDER)
    ours = LabelReader(reference / "relabel")
    epochs = sorted(p.name for p in (folder / "labels").iterdir())
    assert epochs == [f"epoch_{e}" for e in range(6)]  # the reference counts the entries
    for epoch in range(6):
        for batch in order[epoch].split(4):
            number = batches[epoch][int(batch[0])]
            found = torch.load(folder / "labels" / f"epoch_{epoch}" / f"batch_{number}.tar")
            coords, flips, partner, lam, box, logits = found
            assert coords.dtype == torch.float32 and coords.shape == (4, 4) and coords.any()
            assert flips.dtype == torch.bool and partner.dtype == torch.int64
            top, left, bottom, right = box
            assert lam == pytest.approx(1 - (bottom - top) * (right - left) / 64, abs=1e-6)
            assert logits.dtype == torch.float16
            same = ours[epoch * 2 + number]
            assert batch.tolist() == same.index_B.tolist()
            np.testing.assert_array_equal(logits.float(), same.logits_BK)


def test_labels_in_pytorchs_order_need_no_change_of_the_reference(finished, tmp_path):
    """Its sampler and its table of first images alone lead to the file of each batch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    arguments = (TINY, f"--workdir={finished}", "--stages=relabel", "--config.relabel.order=torch")
    status, _, err = call(*arguments, "--config.validate.controls=random_real_hard")
    assert status == 0, err
    export.export(finished, tmp_path / "set", form="fkd")
    assert fkd.ORDER not in (tmp_path / "set" / "README.md").read_text()
    ours = LabelReader(finished / "relabel")
    generators = [torch.Generator() for _ in range(2)]
    samplers = []
    for generator in generators:  # one replays the labels, the other one trains
        generator.manual_seed(42)
        samplers.append(torch.utils.data.RandomSampler(range(8), generator=generator))
    for epoch in range(6):
        first_of = {batch[0]: number for number, batch in enumerate(_in_fours(samplers[0]))}
        for batch in _in_fours(samplers[1]):
            number = first_of[batch[0]]
            found = torch.load(
                tmp_path / "set" / "labels" / f"epoch_{epoch}" / f"batch_{number}.tar"
            )
            same = ours[epoch * 2 + number]
            assert batch == same.index_B.tolist()
            np.testing.assert_array_equal(found[5].float(), same.logits_BK)


def _in_fours(sampler):
    indices = list(sampler)
    return [indices[:4], indices[4:]]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_of_ones_own_goes_out_in_the_space_of_the_run(channels, tmp_path):
    np.savez(
        tmp_path / "set.npz",
        train_images=np.zeros((2, 8, 8, channels), np.uint8), train_labels=np.arange(2),
    )  # fmt: skip
    content = types.SimpleNamespace(
        images_NHWC=np.zeros((2, 8, 8, channels), np.uint8),
        experiment={"dataset": {"name": "photos", "mean": None, "std": None}},
    )
    run = info_of("photos", str(tmp_path / "set.npz")).normalisation
    assert dd_ranking.normalisation_of(content) == run


def test_what_dd_ranking_tests_in_is_what_cifar_goes_out_in():
    """Its constants of version 0.2.0, of CIFAR-100 too; of others the run's are its own."""
    normalisation = lambda name: dd_ranking.normalisation_of(  # noqa: E731
        types.SimpleNamespace(experiment={"dataset": {"name": name, "mean": None, "std": None}})
    )
    for name in ("cifar10", "cifar100"):
        assert normalisation(name).std == (0.2023, 0.1994, 0.2010)
    for name in ("tiny_imagenet", "imagenette", "imagenet"):
        assert normalisation(name).std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("schedule", "zeta", "theirs", "same"),
    [
        ("cosine", None, "cosineannealing", True),
        ("cosine", 2.0, "cosine", True),
        ("half_cosine", None, "cosine", True),
        ("cosine", 1.5, "cosineannealing", False),
        ("cos2", None, "cosine", False),
        ("multistep", None, "cosineannealing", False),
        ("linear", None, "cosineannealing", False),
    ],
)
def test_the_schedules_of_dd_ranking(schedule, zeta, theirs, same):
    """The run's rate beside theirs, as version 0.2.0 defines it: alike exactly where it is said."""
    given = {"schedule": schedule, "zeta": zeta, "warmup_epochs": 0}
    assert dd_ranking._schedule(given) == (theirs, same)
    assert dd_ranking._schedule({**given, "warmup_epochs": 5}) == (theirs, False)
    progress = np.arange(11) / 10
    rates = (1 + np.cos(np.pi * progress / (2 if theirs == "cosine" else 1))) / 2
    given = {} if zeta is None else {"zeta": zeta}
    ours = np.array([schedules.SCHEDULES[schedule](s, 10, **given) for s in range(11)])
    assert np.allclose(ours, rates, atol=1e-6) == same


def test_weights_go_out_and_come_back(finished, tmp_path):
    manifest = workdir.read_record(finished / "recover" / "manifest.json")
    weights = [0.5, 1.5, 1, 1, 2, 0, 1, 1]
    workdir.write_record(finished / "recover" / "manifest.json", {**manifest, "weights": weights})
    for form, file in (("folder", ""), ("npz", "set.npz"), ("dd_ranking", ""), ("parquet", "")):
        if form == "parquet":
            pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        export.export(finished, tmp_path / form, form=form)
        found = opened(tmp_path / form / file, SPACE)
        np.testing.assert_allclose(found.weights_N, weights)
    export.export(finished, tmp_path / "both")  # class folders, and the weights in set.npz alone
    np.testing.assert_allclose(opened(tmp_path / "both").weights_N, weights)


@pytest.mark.parametrize("control, counts", [("medoids", True), ("no_anchors", False)])
def test_the_control_of_an_anchor_goes_out_with_its_weight(finished, tmp_path, control, counts):
    path, weights = finished / "recover" / "manifest.json", [0.5, 1.5, 1, 1, 2, 0, 1, 1]
    workdir.write_record(path, {**workdir.read_record(path), "weights": weights})
    shutil.copytree(finished / "controls" / "random_real", finished / "controls" / control)
    export.export(finished, tmp_path / "npz", control=control, form="npz")
    found = opened(tmp_path / "npz" / "set.npz", SPACE).weights_N
    assert found is None if not counts else found.tolist() == weights
    if counts:
        with pytest.raises(export.UserError, match="which FKD labels have no place for"):
            export.export(finished, tmp_path / "fkd", control=control, form="fkd")
    else:
        export.export(finished, tmp_path / "fkd", control=control, form="fkd")


def test_class_folders_beside_soft_labels_say_where_those_are(reference, tmp_path):
    export.export(reference, tmp_path / "both")
    found = opened(tmp_path / "both")
    assert found.soft_NK is None and found.notes[-1].endswith(
        "soft labels are in set.npz: name that file"
    )
    assert opened(tmp_path / "both" / "set.npz").notes == ()


def test_without_a_library_the_message_says_what_to_install(
    reference, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    to = tmp_path / "set"
    assert export.main([f"--workdir={reference}", f"--to={to}", "--format=parquet"]) == 2
    assert "pip install pyarrow" in capsys.readouterr().err and not to.exists()


@pytest.mark.parametrize("form, worked_out", [("folder", 0), ("fkd", 0), ("npz", 1), (None, 1)])
def test_mean_labels_are_worked_out_only_for_formats_that_hold_them(
    reference, tmp_path, monkeypatch, form, worked_out
):
    calls, mean = [], export.mean_soft_labels
    monkeypatch.setattr(export, "mean_soft_labels", lambda r: calls.append(r) or mean(r))
    export.export(reference, tmp_path / "set", form=form)
    assert len(calls) == worked_out


def test_views_that_fkd_has_no_place_for_are_refused(finished, tmp_path):
    path = finished / "relabel" / "manifest.json"
    manifest = workdir.read_record(path)
    manifest["view"]["mix_per"] = "image"
    workdir.write_record(path, manifest)
    with pytest.raises(export.UserError, match="relabel.mix_per was 'image', which FKD labels"):
        export.export(finished, tmp_path / "set", form="fkd")
    assert not (tmp_path / "set").exists()


def test_labels_that_came_with_a_set_go_out_with_it(made, reference, tmp_path, capsys):
    """They were left out, in every format, as those of other views are."""
    root, given, to = tmp_path / "run", made("npz"), tmp_path / "again"
    status, _, err = call(
        TINY, f"--workdir={root}", f"--from={reference}", "--config.recover.initialise=folder",
        "--config.recover.iterations=0", "--config.recover.pool=()", "--config.relabel.mix=none",
        f"--config.recover.initialise_from={given}", "--config.relabel.labels_from=set",
        "--stages=squeeze,recover,relabel",
    )  # fmt: skip
    assert status == 0, err
    export.export(root, to, form="npz")
    assert "soft labels: softmax of the one label per image" in capsys.readouterr().out
    wanted, found = (np.load(folder / "set.npz") for folder in (given, to))
    np.testing.assert_array_equal(found["images"], wanted["images"])
    np.testing.assert_allclose(found["soft_labels"], wanted["soft_labels"], atol=1e-6)
    assert json.loads(str(found["provenance"]))["soft_labels"]["what"].startswith("softmax")
    with pytest.raises(export.UserError, match="soft labels of every view; this run has none"):
        export.export(root, tmp_path / "fkd", form="fkd")
    # The labels are in the set alone: another one, or none, is seen.
    changed = dict(wanted, images=255 - wanted["images"])
    np.savez(given / "set.npz", **changed)
    with pytest.raises(export.UserError, match="is another set now. The soft labels of"):
        export.export(root, tmp_path / "other", form="npz")
    shutil.rmtree(given)
    with pytest.raises(export.UserError, match="there is no folder .*have it there again"):
        export.export(root, tmp_path / "none")
    export.export(root, tmp_path / "folder", form="folder")


# --- used as any set --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_set_and_its_labels_train_the_students_of_the_run(made, reference, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    root, images, labels = tmp_path / "back", made("parquet"), made("fkd")
    status, out, err = call(
        TINY, f"--workdir={root}", f"--from={reference}", "--config.recover.initialise=folder",
        "--config.recover.iterations=0", "--config.recover.pool=()",
        f"--config.recover.initialise_from={images}", f"--config.relabel.labels_from={labels}",
    )  # fmt: skip
    assert status == 0, err
    assert "first finds" in out + err and "relabel synthetic" not in out
    theirs, ours = (workdir.read_record(r / "recover" / "manifest.json") for r in (reference, root))
    assert ours["digest"] == theirs["digest"]
    assert (root / "recover" / "imported.json").exists() and not (root / "relabel").exists()
    losses = []
    for at in (reference, root):
        lines = (at / "validate" / "outside" / "0" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    assert len(losses[0]) >= 3
    np.testing.assert_allclose(*[[x for x in row if x is not None] for row in losses], rtol=1e-4)
