"""Weights of every kind: the same variables, told apart, and refused where they do not fit."""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.networks import random_variables
from safetensors.numpy import save_file

from prism_jax.core.augment import Augment
from prism_jax.data import weights, workdir
from prism_jax.data.checkpoints import Checkpoints
from prism_jax.errors import UserError
from prism_jax.models import build
from prism_jax.models.import_torch import to_state_dict
from prism_jax.training import TrainRecipe, initial_state

SHAPE = (16, 16, 3)
FORM = {"architecture": "convnet_d1_bn", "width": 0.0625}


@pytest.fixture(scope="module")
def network():
    module = build(num_classes=10, **FORM)
    return module, random_variables(module, SHAPE, 0)


def as_file(folder, variables):
    tensors = {n: np.ascontiguousarray(t) for n, t in to_state_dict(variables).items()}
    save_file(tensors, folder / "w.safetensors")
    return folder / "w.safetensors"


def as_teacher(folder, variables, **stated):
    data = weights.pack(variables)
    workdir.write_bytes(folder / weights.WEIGHTS, data)
    record = {"source": "train", "sha256": weights.sha256(data), **FORM, "depth": 1.0, **stated}
    workdir.write_record(folder / weights.RECORD, record)
    return folder


def as_training(folder, variables, **recipe):
    recipe = TrainRecipe("views", Augment(crop_min=1.0, flip=False), **recipe)
    state = initial_state(build(num_classes=10, **FORM), recipe, 0, SHAPE)
    trained = state._replace(**variables if recipe.ema is None else {"ema": variables})
    checkpoints = Checkpoints(folder / "checkpoints")
    meta = {"averaged": recipe.ema is not None}
    checkpoints.save(3, state, meta)
    checkpoints.save(500, trained, meta)
    checkpoints.close()
    return folder / "checkpoints"


def as_step(folder, variables):
    return as_training(folder, variables) / "500"


def as_sgd(folder, variables):
    return as_training(folder, variables, optimiser="sgd")


def as_average(folder, variables):
    return as_training(folder, variables, ema=0.9)


def as_tree(folder, variables):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "tree", variables)
    return folder / "tree"


def as_managed(folder, variables):
    with ocp.CheckpointManager(folder / "manager") as manager:
        manager.save(2, args=ocp.args.StandardSave(jax.tree.map(np.zeros_like, variables)))
        manager.save(10, args=ocp.args.StandardSave(variables))
    return folder / "manager"


KINDS = [as_file, as_teacher, as_training, as_step, as_sgd, as_average, as_tree, as_managed]


def load(path, classes=10, shape=SHAPE, **form):
    return weights.load(str(path), num_classes=classes, image_shape=shape, **{**FORM, **form})


def refused(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_gives_the_same_variables(write, network, tmp_path):
    path = write(tmp_path, network[1])
    before = weights.digest(path)
    loaded = load(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, network[1]))
    assert weights.digest(path) == before  # nothing was written
    assert "head of 10 classes; 4 were asked" in refused(path, classes=4)
    assert "another size" in refused(path, shape=(32, 32, 3))


def test_a_head_of_other_classes_is_replaced_where_one_is_given(network, tmp_path):
    """All else is the file's; with as many classes nothing is replaced."""
    path, said = as_teacher(tmp_path, network[1]), []
    fresh = random_variables(build(num_classes=4, **FORM), SHAPE, 1)
    loaded = load(path, classes=4, head=fresh, say=said.append)
    same = lambda a, b: jax.tree.all(jax.tree.map(np.array_equal, a, b))  # noqa: E731
    heads = {name for name, leaf in loaded["params"].items() if same(leaf, fresh["params"][name])}
    kept = loaded["params"].keys() - heads
    assert heads and kept and all(same(loaded["params"][n], network[1]["params"][n]) for n in kept)
    assert same(loaded["batch_stats"], network[1]["batch_stats"])
    assert said == [f"{path}: a new head of 4 classes in place of 10"]
    other = random_variables(network[0], SHAPE, 1)
    assert same(load(path, head=other, say=said.append), network[1]) and len(said) == 1
    assert "another size" in refused(path, classes=4, head=fresh, shape=(32, 32, 3))


def test_weights_without_a_head_get_the_new_one(network, tmp_path):
    """Backbones of self-supervised training: the head would be drawn anew in any case."""
    fresh, said = random_variables(network[0], SHAPE, 1), []
    tensors = to_state_dict(network[1])
    bare = {name: t for name, t in tensors.items() if not name.startswith("classifier")}
    assert len(tensors) - len(bare) == 2
    path = tmp_path / "bare.npz"
    np.savez(path, **{f"backbone.{name}": tensor for name, tensor in bare.items()})
    loaded = load(path, head=fresh, say=said.append)
    assert said[-1] == f"{path}: it has no head; a new one of 10 classes is drawn"
    found, drawn = to_state_dict(loaded), to_state_dict(fresh)
    for name, tensor in found.items():
        wanted = (bare if name in bare else drawn)[name]
        np.testing.assert_array_equal(tensor, wanted)
    assert "Only the head is missing: in a config networks.NAME.start_from" in refused(path)
    # The twin: something else is missing, too.
    np.savez(path, **dict(list(bare.items())[1:]))
    with pytest.raises(UserError, match="tensors missing from the file"):
        load(path, head=fresh, say=said.append)
    assert "Only the head" not in refused(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tf_efficientnet_b0_ns.npz", "epsilon of 0.001"),
        ("resnetaa50_a1h.npz", "blur before"),
        ("resnetblur50.npz", "blur before"),
        ("resnet50.npz", None),
        ("not_tf_x.npz", None),
    ],
)
def test_what_no_tensor_shows_is_said_by_a_files_name(network, tmp_path, name, said):
    notes = []
    np.savez(tmp_path / name, **to_state_dict(network[1]))
    load(tmp_path / name, say=notes.append)
    assert [said in note for note in notes if "ours" in note] == ([True] if said else [])


def test_a_key_is_for_files_with_several_networks(network, tmp_path):
    for write in (as_teacher, as_tree, as_step):
        path = write(tmp_path / write.__name__, network[1])
        assert 'weights_key="ema" chooses in a file' in refused(path, key="ema")
    tensors = to_state_dict(network[1])
    path = tmp_path / "two.npz"
    np.savez(path, **{f"a.{n}": t for n, t in tensors.items()},
             **{f"b.{n}": 2 * t for n, t in tensors.items()})  # fmt: skip
    assert '"a" or "b"' in refused(path)
    twice = jax.tree.map(lambda a: 2 * a, network[1])
    for key, wanted in (("a", network[1]), ("b", twice)):
        assert jax.tree.all(jax.tree.map(np.array_equal, load(path, key=key), wanted))


def test_weights_of_ours_without_their_record(network, tmp_path):
    (tmp_path / weights.WEIGHTS).write_bytes(weights.pack(network[1]))
    loaded = load(tmp_path / weights.WEIGHTS)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, network[1]))


def test_the_file_of_a_teacher_stands_for_its_folder(network, tmp_path):
    folder = as_teacher(tmp_path, network[1])
    loaded = load(folder / weights.WEIGHTS)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, network[1]))


def test_a_teacher_of_another_form_is_refused(network, tmp_path):
    folder = as_teacher(tmp_path, network[1], width=0.5, stem="small")
    message = refused(folder)
    assert "width 0.5, not 0.0625" in message and "stem small, not imagenet" in message
    assert "architecture convnet_d1_bn, not resnet20" in refused(folder, architecture="resnet20")


def test_digests_follow_the_content(network, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    digests = [weights.digest(as_training(folder, network[1])) for folder in (one, other)]
    assert digests[0] == weights.digest(one / "checkpoints")
    (file,) = (one / "checkpoints" / "500").rglob("*.msgpack")
    file.write_bytes(file.read_bytes() + b"x")
    assert weights.digest(one / "checkpoints") != digests[0]
    with pytest.raises(UserError, match="no checkpoint file at"):
        weights.digest(tmp_path / "absent")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_may_be_named(network, tmp_path):
    folder = as_training(tmp_path, network[1])
    (file,) = (folder / "500").rglob("*.msgpack")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    message = refused(folder)
    assert "500 is damaged, and is the last of" in message and "name one before it" in message
    assert weights.read(str(folder / "3"), **FORM).kind.endswith("step 3 of a training")


def test_what_is_no_weights_is_explained(network, tmp_path):
    assert "there is no weight file" in refused(tmp_path / "absent.pth")
    message = refused(tmp_path)
    assert "record.json" in message and "Orbax" in message and ".pth" in message
    as_training(tmp_path, network[1])
    assert str(tmp_path / "checkpoints") in refused(tmp_path)
    as_file(tmp_path, network[1])
    assert "name a file in it: w.safetensors" in refused(tmp_path)
    tree = as_tree(tmp_path / "other", {"images": np.zeros(3)})
    assert 'has no "params"' in refused(tree)
    (tree / "manifest.ocdbt").write_bytes(b"nonsense")
    assert "cannot be read" in refused(tree)
    message = refused(tmp_path / "checkpoints", architecture="resnet20")
    assert "no checkpoint of a training of resnet20" in message
