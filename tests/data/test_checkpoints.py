from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from prism_jax.data import orbax_files
from prism_jax.data.checkpoints import Checkpoints, read_newest
from prism_jax.errors import UserError


def state_of(step: int) -> dict:
    random = np.random.default_rng(step)
    images = random.standard_normal((4, 8, 8, 1), np.float32)
    images[0, 0, 0, 0], images[0, 0, 1, 0] = np.nan, -0.0
    return {
        "images": images,
        "moments": (random.standard_normal((50, 20), np.float32), np.zeros((2, 3), np.float32)),
        "half": jnp.asarray(random.standard_normal(5, np.float32), jnp.bfloat16),
        "seen": np.array([True, False]),
        "step": np.int32(step),
    }


def same(a, b) -> bool:
    """Bit for bit, NaN and the sign of zero too."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and np.shape(x) == np.shape(y)
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(a, b, strict=True)
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 3 and 6. Only to be read."""
    folder = tmp_path_factory.mktemp("checkpoints") / "unit"
    checkpoints = Checkpoints(folder)
    for step in (3, 6):
        checkpoints.save(step, state_of(step), {"seconds": step / 7, "terms": None})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "unit")


def restore(folder, like=None):
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore(like if like is not None else state_of(0))
    checkpoints.close()
    return found


def content(folder, step: int):
    """The file of a checkpoint that holds its arrays and meta."""
    (path,) = (folder / str(step)).rglob("state.msgpack")
    return path


def test_the_newest_comes_back_exactly(saved):
    step, state, meta = restore(saved)
    assert step == 6 and same(state, state_of(6)) and not same(state, state_of(3))
    assert jax.tree.structure(state) == jax.tree.structure(state_of(6))
    assert meta == {"seconds": 6 / 7, "terms": None}


def test_nothing_is_restored_from_nothing(tmp_path):
    assert restore(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"images": np.zeros((4, 8, 9, 1), np.float32)},
            r"images.*: float32\(4, 8, 8, 1\) -> float32\(4, 8, 9, 1\)",
        ),
        ({"half": np.zeros(5, np.float32)}, r"half.*: bfloat16\(5,\) -> float32\(5,\)"),
        ({"more": np.zeros(1, np.float32)}, r"arrays: 6 -> 7"),
    ],
)
def test_other_shapes_are_refused_and_named(folder, change, said):
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(UserError, match=said) as refused:
        restore(folder, {**state_of(0), **change})
    assert f"move {folder} away" in str(refused.value)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_checkpoint_of_other_work_is_refused_and_the_difference_named(tmp_path):
    """Its arrays fit: only what it says of itself tells."""
    mine = {"recover": {"bits_version": 2, "first_layer": "bn"}, "teachers": {"a": "1f"}}
    checkpoints = Checkpoints(tmp_path / "unit", of=mine)
    checkpoints.save(3, state_of(3), {"seconds": 1.0})
    checkpoints.close()
    for key, value, line in (
        ("recover", {"bits_version": 3, "first_layer": "bn"}, "recover.bits_version: 2 -> 3"),
        ("teachers", {"a": "1f", "b": "2e"}, 'teachers.b: (absent) -> "2e"'),
    ):
        other = Checkpoints(tmp_path / "unit", of={**mine, key: value})
        with pytest.raises(UserError, match="belongs to other work") as refused:
            other.restore(state_of(0))
        other.close()
        assert f"  - {line}\n" in str(refused.value)
    again = Checkpoints(tmp_path / "unit", of=mine)
    step, state, meta = again.restore(state_of(0))
    again.close()
    assert step == 3 and same(state, state_of(3)) and meta == {"seconds": 1.0}
    # Twin: who does not say what is wanted is given it.
    assert restore(tmp_path / "unit")[0] == 3


def test_a_cut_newest_is_passed_over_and_set_aside(folder, capsys):
    path = content(folder, 6)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    step, state, _ = restore(folder)
    assert step == 3 and same(state, state_of(3))
    said = capsys.readouterr().out.replace("\n", " ")
    assert "is damaged" in said and "6.set-aside-1" in said
    assert sorted(p.name for p in folder.iterdir()) == ["3", "6.set-aside-1"]


def test_work_goes_on_after_a_damaged_one(folder, capsys):
    content(folder, 6).write_bytes(b"")
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(state_of(0))[0] == 3
    checkpoints.save(4, state_of(4))  # smaller than the damaged one's step
    checkpoints.close()
    step, state, _ = restore(folder)
    assert step == 4 and same(state, state_of(4))


def test_the_twin_that_leaves_a_damaged_one_in_place_saves_nothing(folder):
    with ocp.CheckpointManager(folder) as manager:
        arguments = ocp.args.Composite(state=ocp.args.StandardSave({"x": np.zeros(3)}))
        assert not manager.save(4, args=arguments)


def test_every_flipped_bit_is_noticed(folder, tmp_path, capsys):
    random, path = np.random.default_rng(0), content(folder, 6)
    whole = path.read_bytes()
    for number, at in enumerate([0, 1, 2, *random.integers(len(whole), size=17)]):
        data = bytearray(whole)
        data[at] ^= 1 << int(random.integers(8))
        twin = shutil.copytree(folder, tmp_path / f"twin{number}")
        content(twin, 6).write_bytes(data)
        step, state, meta = restore(twin)
        assert step == 3 and same(state, state_of(3)) and meta["seconds"] == 3 / 7


class Unavailable(Exception):
    """As an object store's client raises it: no OSError."""


@pytest.mark.parametrize(
    ("where", "failure"),
    [("read", kind) for kind in (TimeoutError, PermissionError, MemoryError, Unavailable)]
    + [("parsed", MemoryError)],
)
def test_one_that_could_not_be_read_is_not_damaged(folder, monkeypatch, where, failure):
    """A network's pause or a full memory would cost the hours that the checkpoints hold."""
    whole, failures = getattr(orbax_files, where), []

    def once(given):
        if failures:
            raise failures.pop()
        return whole(given)

    monkeypatch.setattr(orbax_files, where, once)
    for again in (lambda: restore(folder), lambda: read_newest(epath.Path(folder))):
        failures.append(failure("for now"))
        with pytest.raises(failure):
            again()
        assert sorted(p.name for p in folder.iterdir()) == ["3", "6"]
        assert again()[0] == 6


def test_one_without_its_file_is_damaged(folder, capsys):
    content(folder, 6).unlink()
    with pytest.raises(UserError, match="6 is damaged, and is the last of"):
        read_newest(epath.Path(folder))  # the one before is of other weights
    assert restore(folder)[0] == 3
    assert sorted(p.name for p in folder.iterdir()) == ["3", "6.set-aside-1"]


def test_the_newest_is_of_the_step_that_is_known(folder):
    assert read_newest(folder, step=6)[0] == 6
    assert read_newest(folder / "3")[0] == 3
    shutil.rmtree(folder / "6")
    with pytest.raises(UserError, match="no whole checkpoint of step 6; its last is 3"):
        read_newest(folder, step=6)


def test_an_unfinished_save_is_no_checkpoint(folder):
    (folder / "6").rename(folder / "9.orbax-checkpoint-tmp")
    step, state, _ = restore(folder)
    assert step == 3 and same(state, state_of(3))


def test_a_saved_step_is_left_as_it_is(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(6, state_of(5))
    checkpoints.close()
    assert same(restore(folder)[1], state_of(6))


def test_two_are_kept(folder):
    checkpoints = Checkpoints(folder)
    for step in (7, 8):
        checkpoints.save(step, state_of(step))
    checkpoints.close()
    assert sorted(int(p.name) for p in folder.iterdir()) == [7, 8]


def test_delete_removes_all_and_may_be_repeated(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(9, state_of(9))
    checkpoints.delete()
    checkpoints.delete()
    assert not folder.exists()


def test_due_after_the_interval(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path / "unit", every_seconds=60.0)
    now[0] = 159.0
    assert not checkpoints.due
    now[0] = 160.0
    assert checkpoints.due
    monkeypatch.undo()
    assert not (tmp_path / "unit").exists()  # nothing is opened before the first save
