"""A finished set goes out as an ImageFolder and an .npz, comes back in, and keeps its pixels."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from helpers.command import TINY, call, finished, reference, snapshot
from PIL import Image

from prism_jax.core import pixels
from prism_jax.data import image_set, workdir
from prism_jax.data.datasets import DATASETS
from prism_jax.data.label_store import LabelReader
from prism_jax.data.lazy import LazyImages
from prism_jax.tools import export

__all__ = ["finished", "reference"]  # fixtures


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = export.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def refused(capsys, *arguments) -> str:
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


def mean_of_softmax(reader: LabelReader) -> np.ndarray:
    """Image by image, and view by view, in the order of the images."""
    views: dict[int, list[np.ndarray]] = {}
    for record in reader.read():
        for image, logits in zip(record.index_B, record.logits_BK, strict=True):
            odds = [np.exp(float(z)) for z in logits]
            views.setdefault(int(image), []).append(np.array(odds) / sum(odds))
    return np.array([np.mean(views[image], axis=0) for image in sorted(views)])


@pytest.fixture
def exported(reference, tmp_path, capsys):
    status, out, err = run(capsys, f"--workdir={reference}", f"--to={tmp_path / 'set'}")
    assert status == 0, err
    assert "8 images of 4 classes" in out and "mean over all stored views" in out
    return tmp_path / "set"


def test_the_folder_has_the_workdir_s_pixels_in_label_order(exported, reference):
    found = {
        str(path.relative_to(exported)): np.array(Image.open(path))
        for path in exported.rglob("*.png")
    }
    assert sorted(found) == [f"{c:05d}/{s:05d}.png" for c in range(4) for s in range(2)]
    images, _ = image_set.read_images(reference / "recover" / "images", 4, 2)
    np.testing.assert_array_equal([found[name] for name in sorted(found)], images[..., 0])
    beside = {path.name for path in exported.iterdir() if path.is_file()}
    assert beside == {"classes.json", "provenance.json", "set.npz"}
    classes = json.loads((exported / "classes.json").read_text())
    assert classes[3] == {"folder": "00003", "index": 3, "name": "3"}


def test_image_folder_reads_the_same_order(exported):
    """torchvision's rule by hand: folders, then files, sorted as text; other files ignored."""
    folders = sorted(entry.name for entry in os.scandir(exported) if entry.is_dir())
    samples = [
        (os.path.join(folder, name), label)
        for label, folder in enumerate(folders)
        for name in sorted(os.listdir(exported / folder))
    ]
    assert [label for _, label in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    images = np.load(exported / "set.npz")["images"]
    for (name, _), image in zip(samples, images, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(exported / name)), image[..., 0])
    assert folders == [c["folder"] for c in json.loads((exported / "classes.json").read_text())]


def test_the_npz_has_images_labels_mean_soft_labels_and_where_they_are_from(exported, reference):
    with np.load(exported / "set.npz", allow_pickle=False) as npz:
        arrays = dict(npz)
    images, labels = image_set.read_images(reference / "recover" / "images", 4, 2)
    assert arrays["images"].dtype == np.uint8 and arrays["images"].shape == (8, 8, 8, 1)
    np.testing.assert_array_equal(arrays["images"], images)
    np.testing.assert_array_equal(arrays["labels"], labels)
    assert arrays["class_names"].tolist() == ["0", "1", "2", "3"]

    reader = LabelReader(reference / "relabel")
    soft = arrays["soft_labels"]
    assert soft.dtype == np.float32 and soft.shape == (8, 4)
    np.testing.assert_allclose(soft, mean_of_softmax(reader), rtol=1e-6)
    # The twin: the softmax of the mean logits is another label.
    logits = np.zeros((8, 4))
    for record in reader.read():
        logits[record.index_B] += record.logits_BK / reader.plan.epochs
    other = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.abs(other - soft).max() > 1e-3

    provenance = json.loads(str(arrays["provenance"]))
    assert provenance == json.loads((exported / "provenance.json").read_text())
    assert provenance["images_sha256"] == image_set.digest(images)
    assert provenance["experiment"]["recover"]["iterations"] == 12
    assert provenance["provenance"]["command"].startswith("python -m prism_jax.main --config=")
    assert {"commit", "versions"} <= provenance["provenance"].keys()
    assert provenance["soft_labels"]["plan"]["epochs"] == 6
    weights = workdir.read_record(reference / "squeeze" / "first" / "record.json")["sha256"]
    assert provenance["soft_labels"]["teachers"] == {"first": weights}


def test_the_same_run_is_exported_to_the_same_bytes(exported, reference, tmp_path, capsys):
    run(capsys, f"--workdir={reference}", f"--to={tmp_path / 'again'}")
    for path in exported.rglob("*"):
        if path.is_file():
            assert (
                path.read_bytes() == (tmp_path / "again" / path.relative_to(exported)).read_bytes()
            )


def test_a_control_is_exported_with_its_own_images_and_labels(reference, tmp_path, capsys):
    to = tmp_path / "set"
    status, _, err = run(capsys, f"--workdir={reference}", f"--to={to}", "--control=random_real")
    assert status == 0, err
    control = reference / "controls" / "random_real"
    with np.load(to / "set.npz") as npz:
        np.testing.assert_array_equal(
            npz["images"], image_set.read_images(control / "images", 4, 2)[0]
        )
        expected = mean_of_softmax(LabelReader(control / "relabel"))
        np.testing.assert_allclose(npz["soft_labels"], expected, rtol=1e-6)
        assert json.loads(str(npz["provenance"]))["set"] == "random_real"


def test_other_images_in_a_control_s_place_are_not_exported(finished, tmp_path, capsys):
    arguments = (f"--workdir={finished}", "--control=random_real")
    images = finished / "controls/random_real/images"
    shutil.copy(images / "00001/00000.png", images / "00002/00000.png")
    err = refused(capsys, *arguments, f"--to={tmp_path / 'set'}")
    assert f"{images} are not those that the run wrote. Delete {images}, then repair them" in err
    shutil.rmtree(images)
    assert call(*err.split("python -m prism_jax.main ")[1].split())[0] == 0
    assert run(capsys, *arguments, f"--to={tmp_path / 'set'}")[0] == 0


def test_real_images_that_a_teacher_chose_are_exported_too(finished, tmp_path, capsys):
    arguments = (f"--workdir={finished}", f"--to={tmp_path / 'set'}", "--control=real_confident")
    said = refused(capsys, *arguments).strip().splitlines()[-1]
    command = said.split("python -m prism_jax.main ")[1].split()
    controls = workdir.read_run(finished)["experiment"]["validate"]["controls"]
    asked = f"--config.validate.controls={','.join([*controls, 'real_confident'])}"
    assert controls and asked in command  # beside those that the run has
    status, _, err = call(*command)
    assert status == 0, err
    assert run(capsys, *arguments)[0] == 0
    with np.load(tmp_path / "set" / "set.npz") as npz:
        images, _ = image_set.read_images(finished / "controls/real_confident/images", 4, 2)
        np.testing.assert_array_equal(npz["images"], images)
        synthetic, _ = image_set.read_images(finished / "recover/images", 4, 2)
        assert not np.array_equal(images, synthetic)
        assert json.loads(str(npz["provenance"]))["set"] == "real_confident"


def test_imagenet_classes_are_folders_by_wnid():
    imagenette = DATASETS["imagenette"]
    table = export.class_table(imagenette, 10, None, imagenette.imagenet_indices)
    assert table[0] == {"folder": "n01440764", "index": 0, "name": "tench"}
    assert table[9] == {"folder": "n03888257", "index": 9, "name": "parachute"}
    ids = tuple(entry["folder"] for entry in table)
    assert export.class_table(DATASETS["imagenet"], 10, ids, imagenette.imagenet_indices) == [
        {**entry, "name": entry["folder"]} for entry in table
    ]
    folders = [e["folder"] for e in export.class_table(None, 1000, None, tuple(range(1000)))]
    assert folders == sorted(folders) and len(set(folders)) == 1000


def test_classes_in_another_order_are_not_sorted_by_wnid():
    """Folders of class names stand in another order than their IDs; ImageFolder would mix them."""
    imagenette = DATASETS["imagenette"]
    order = np.argsort(imagenette.class_names)
    names = tuple(imagenette.class_names[i] for i in order)
    indices = tuple(imagenette.imagenet_indices[i] for i in order)
    table = export.class_table(imagenette, 10, names, indices)
    assert [e["folder"] for e in table] == [f"{i:05d}" for i in range(10)]
    assert tuple(e["name"] for e in table) == names
    assert [e["name"] for e in export.class_table(None, 2, None, None)] == ["0", "1"]


# --- refused, and whole or not at all ---------------------------------------------------------


def test_an_existing_target_is_refused_and_kept(exported, reference, capsys):
    before = snapshot(exported)
    err = refused(capsys, f"--workdir={reference}", f"--to={exported}")
    assert f"--to={exported} is there already; delete it" in err
    assert snapshot(exported) == before


def test_what_is_not_finished_is_refused_with_the_command_that_finishes_it(
    finished, tmp_path, capsys
):
    arguments = (f"--workdir={finished}", f"--to={tmp_path / 'set'}")
    assert "is no working directory" in refused(capsys, f"--workdir={tmp_path}", arguments[1])
    shutil.rmtree(finished / "relabel")
    err = refused(capsys, *arguments)
    assert "no finished soft labels" in err
    shutil.rmtree(finished / "controls")
    assert "no images of the control" in refused(capsys, *arguments, "--control=random_real")
    (finished / "recover" / "manifest.json").unlink()
    assert "no finished images" in refused(capsys, *arguments)
    # The command is a whole one: it is run, and then there is something to export.
    said = err.strip().splitlines()[-1].split("python -m prism_jax.main ")[1].split()
    assert said == [TINY, f"--workdir={finished}", "--stages=squeeze,recover,relabel"]
    status, _, err = call(*said)
    assert status == 0, err
    for more in ((), ("--control=random_real",)):
        assert run(capsys, *arguments, *more)[0] == 0
        shutil.rmtree(tmp_path / "set")


def test_the_command_for_a_control_asks_for_it(reference):
    ran = workdir.read_json(reference / "config.json")
    ran["experiment"]["validate"]["controls"] = []
    ran["provenance"]["command"] = (
        "python -m prism_jax.main --config=c.py --workdir a --stages recover --config.seed 3"
    )
    assert export.command(reference, ran, "relabel", "random_real") == (
        "python -m prism_jax.main --config=c.py --config.seed=3 "
        f"--config.validate.controls=random_real --workdir={reference} --stages=relabel"
    )


@pytest.mark.parametrize("cut", [True, False])
def test_damaged_images_are_not_exported(finished, tmp_path, capsys, cut):
    path = finished / "recover" / "images" / "00001" / "00000.png"
    if cut:
        path.write_bytes(path.read_bytes()[:50])
    else:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    err = refused(capsys, f"--workdir={finished}", f"--to={tmp_path / 'set'}")
    assert (str(path) if cut else "not those that the run wrote") in err
    assert not (tmp_path / "set").exists()


def test_a_run_without_stored_labels_is_exported_without_them(finished, tmp_path, capsys):
    ran = workdir.read_json(finished / "config.json")
    ran["experiment"]["relabel"]["mode"] = "online"
    workdir.write_json(finished / "config.json", ran)
    # Labels that are still there are of the settings before.
    status, out, err = run(capsys, f"--workdir={finished}", f"--to={tmp_path / 'set'}")
    assert status == 0 and "soft labels: none, relabel.mode=online stores none" in out
    with np.load(tmp_path / "set" / "set.npz") as npz:
        assert "soft_labels" not in npz and "images" in npz


def test_a_run_of_hard_labels_is_exported_without_soft_ones(finished, tmp_path, capsys):
    ran = workdir.read_json(finished / "config.json")
    ran["experiment"]["validate"]["loss"] = "ce"
    workdir.write_json(finished / "config.json", ran)
    shutil.rmtree(finished / "relabel")
    status, out, err = run(capsys, f"--workdir={finished}", f"--to={tmp_path / 'set'}")
    assert status == 0 and "students learn from the classes (validate.loss=ce)" in out


def test_a_bucket_is_no_target(reference, capsys):
    """Writers of formats know files alone: half of the set would be in a folder named gs:."""
    err = refused(capsys, f"--workdir={reference}", "--to=gs://bucket/set")
    assert "--to=gs://bucket/set is in an object store; name a folder here" in err


def test_the_command_of_a_comparison_s_cell_is_the_comparison(reference):
    ran = workdir.read_json(reference / "config.json")
    ran["provenance"]["command"] = "python -m prism_jax.compare --config=configs/compare/digits.py"
    assert export.command(reference, ran, "relabel", "real_herding") == (
        "python -m prism_jax.compare --config=configs/compare/digits.py"
    )


@pytest.mark.parametrize("form", ["folder", "fkd"])
def test_images_that_are_files_are_read_one_after_the_other(reference, tmp_path, capsys, form):
    """A set of ImageNet's size is not held in memory."""
    most = []
    read = LazyImages.__getitem__

    def counted(images, index):
        found = read(images, index)
        most.append(found.size // 64)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LazyImages, "__getitem__", counted)
        patched.setattr(image_set, "chunks", lambda count: (slice(i, i + 1) for i in range(count)))
        arguments = (f"--workdir={reference}", f"--to={tmp_path / form}", f"--format={form}")
        assert run(capsys, *arguments)[0] == 0
    assert set(most) == {1}


def test_labels_of_other_settings_are_not_given_away(finished, tmp_path, capsys):
    ran = workdir.read_json(finished / "config.json")
    ran["experiment"]["relabel"]["epochs"] += 1
    workdir.write_json(finished / "config.json", ran)
    err = refused(capsys, f"--workdir={finished}", f"--to={tmp_path / 'set'}")
    epochs = ran["experiment"]["relabel"]["epochs"]
    assert f"(relabel.epochs={epochs - 1}, now {epochs}); make them anew with" in err


def test_an_export_that_fails_or_is_killed_leaves_no_target(reference, tmp_path, monkeypatch):
    to = tmp_path / "set"
    (tmp_path / ".set.tmp" / "00007").mkdir(parents=True)  # of one that was killed

    def full(*_, **__):
        assert (tmp_path / ".set.tmp" / "00003" / "00001.png").exists() and not to.exists()
        raise OSError(28, "No space left on device", "set.npz")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        assert export.main([f"--workdir={reference}", f"--to={to}"]) == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".set.tmp" / "00007").mkdir(parents=True)
    assert export.main([f"--workdir={reference}", f"--to={to}"]) == 0
    assert list(tmp_path.iterdir()) == [to] and not (to / "00007").exists()


def test_unknown_arguments(capsys):
    assert "--to" in refused(capsys, "--workdir=x")
    assert "full_real" in refused(capsys, "--workdir=x", "--to=y", "--control=full_real")
    assert run(capsys, "--help")[0] == 0


# --- and back in ------------------------------------------------------------------------------


FOLDER = ("--config.recover.initialise=folder", "--config.recover.iterations=0")


def test_the_round_trip_keeps_every_pixel_and_labels_and_students_follow(
    exported, reference, tmp_path
):
    root = tmp_path / "back"
    status, out, err = call(
        TINY, f"--workdir={root}", f"--from={reference}", *FOLDER,
        f"--config.recover.initialise_from={exported}", "--config.recover.pool=()",
        "--config.squeeze.teachers=first,outside", "--config.recover.rounding=truncate",
    )  # fmt: skip
    assert status == 0, err
    theirs, ours = (workdir.read_record(r / "recover" / "manifest.json") for r in (reference, root))
    assert ours["digest"] == theirs["digest"]
    assert not (root / "squeeze" / "second").exists() and ours["pool"] == []
    # Equal images and settings: equal labels and students, though they are made anew.
    assert "relabel synthetic" in out and "validate synthetic/outside/0: 12/12" in out
    for mine, other in zip(
        LabelReader(root / "relabel").read(), LabelReader(reference / "relabel").read(), strict=True
    ):
        np.testing.assert_array_equal(mine.logits_BK, other.logits_BK)
    students = [
        workdir.read_record(r / "validate" / "outside" / "0" / "record.json")["top1"]
        for r in (root, reference)
    ]
    assert students[0] == students[1]
    before = snapshot(root)
    shutil.move(exported, exported.with_name("moved"))
    status, _, err = call(
        TINY, f"--workdir={root}", *FOLDER,
        f"--config.recover.initialise_from={exported.with_name('moved')}",
        "--config.recover.pool=()", "--config.squeeze.teachers=first,outside",
        "--config.recover.rounding=truncate",
    )  # fmt: skip
    assert status == 0, err
    assert snapshot(root) == before


def test_truncation_would_have_changed_pixels(exported):
    """The twin: recover.rounding=truncate is not what an import may do."""
    images, normalisation = (
        np.load(exported / "set.npz")["images"],
        DATASETS["digits"].normalisation,
    )
    floats = pixels.normalise(images, normalisation)
    np.testing.assert_array_equal(pixels.to_uint8(floats, normalisation), images)
    assert (np.asarray(pixels.to_uint8(floats, normalisation, rounding="truncate")) != images).any()


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "mnist"])
def test_every_level_survives_the_floats(name):
    info = DATASETS[name]
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(info.channels, -1)
    floats = pixels.normalise(levels, info.normalisation)
    np.testing.assert_array_equal(pixels.to_uint8(floats, info.normalisation), levels)


def test_a_folder_that_does_not_fit_is_refused_before_any_work(exported, tmp_path):
    root = tmp_path / "back"
    shutil.rmtree(exported / "00003")
    status, _, err = call(
        TINY, f"--workdir={root}", *FOLDER, f"--config.recover.initialise_from={exported}"
    )
    assert status == 2 and "has 3 class folders, but dataset.num_classes is 4" in err
    assert not root.exists()


def test_real_images_without_iterations_need_no_pool(reference, tmp_path):
    """What RDED's cut-outs are, without their choice: the images as they are."""
    root = tmp_path / "real"
    status, out, err = call(
        TINY, f"--workdir={root}", f"--from={reference}", "--config.recover.iterations=0",
        "--config.recover.pool=()", "--stages=squeeze,recover",
    )  # fmt: skip
    assert status == 0, err
    from sklearn.datasets import load_digits

    images, labels = image_set.read_images(root / "recover" / "images", 4, 2)
    real = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    for image in images:
        assert (real == image[..., 0]).all((1, 2)).any()


def test_the_plan_of_an_import(exported):
    status, out, err = call(
        TINY, *FOLDER, f"--config.recover.initialise_from={exported}", "--config.recover.pool=()",
        "--plan",
    )  # fmt: skip
    assert status == 0, err
    assert "none" in out and "relabel takes" in out and "recover takes" not in out
