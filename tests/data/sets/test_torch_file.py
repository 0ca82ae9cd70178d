"""Files of torch.save, read and written without PyTorch."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest
from helpers import torch_files

from prism_jax.data.sets import torch_file
from prism_jax.errors import UserError

VALUES = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(0.25, np.float32),
    np.array([[True, False]]),
    np.zeros((0, 4), np.int64),
    (1, -5, 2**40, 1.5, None, True, "ä"),
    {"a": [np.arange(3, dtype=np.int64), np.ones(2, np.float16)]},
]


def assert_equal(found, wanted) -> None:
    assert type(found) is type(wanted)
    match wanted:
        case np.ndarray():
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
            np.testing.assert_array_equal(found, wanted)
        case dict():
            assert found.keys() == wanted.keys()
            assert_equal(list(found.values()), list(wanted.values()))
        case list() | tuple():
            assert len(found) == len(wanted)
            for x, y in zip(found, wanted, strict=True):
                assert_equal(x, y)
        case _:
            assert found == wanted


def test_what_is_written_comes_back(tmp_path):
    torch_file.save(tmp_path / "x.pt", VALUES)
    assert_equal(torch_file.load(tmp_path / "x.pt"), VALUES)
    torch_file.save(tmp_path / "y.pt", VALUES)
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()


def test_pytorch_reads_it_and_it_reads_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch_file.save(tmp_path / "x.pt", VALUES)
    tensors = torch.load(tmp_path / "x.pt", weights_only=True)
    as_arrays = [t.numpy() for t in tensors[:4]]
    assert_equal(as_arrays, VALUES[:4])
    assert tensors[4] == VALUES[4] and torch.equal(tensors[5]["a"][1], torch.ones(2).half())

    value = [
        torch.arange(12.0).reshape(3, 4).t()[1:],  # with strides and an offset
        [np.int64(3), np.float64(0.25), np.bool_(True)],
        torch.tensor(2.5, dtype=torch.bfloat16),
        None,
    ]
    torch.save(value, tmp_path / "y.pt")
    found = torch_file.load(tmp_path / "y.pt")
    np.testing.assert_array_equal(found[0], np.arange(12.0).reshape(3, 4).T[1:])
    assert found[1] == [3, 0.25, True] and float(found[2]) == 2.5 and found[3] is None


def test_the_format_before_1_6(tmp_path, monkeypatch):
    kind, rebuild = torch_files.fake_torch(monkeypatch)
    state = {"images": np.arange(12, dtype=np.float32), "labels": np.arange(3, dtype=np.float32)}
    view = torch_files.Stored("0", state["images"].reshape(3, 4).T, rebuild)
    other = torch_files.Stored("1", state["labels"], rebuild)
    found = {"data": [[view, other]], "accs": [1.5]}
    path = torch_files.legacy(state, found, kind, tmp_path / "res.pt")
    read = torch_file.load(path)
    np.testing.assert_array_equal(read["data"][0][0], state["images"].reshape(3, 4).T)
    np.testing.assert_array_equal(read["data"][0][1], state["labels"])
    assert read["accs"] == [1.5]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="res.pt is damaged .*storage 1 is cut off"):
        torch_file.load(path)


def test_pytorch_writes_the_format_before_1_6(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    value = [torch.arange(12.0).reshape(3, 4).t()[1:], torch.nn.Parameter(torch.ones(2)), "text"]
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    found = torch_file.load(tmp_path / "x.pt")
    np.testing.assert_array_equal(found[0], np.arange(12.0).reshape(3, 4).T[1:])
    assert found[1].tolist() == [1, 1] and found[2] == "text"


class _Calls:
    def __reduce__(self):
        return print, ("run",)


def _zip(path, pickled: bytes, storages=()) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)


def test_nothing_is_run(tmp_path, capsys):
    _zip(tmp_path / "x.pt", pickle.dumps(_Calls()))
    with pytest.raises(UserError, match="builtins.print, which is no tensor; nothing of it"):
        torch_file.load(tmp_path / "x.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x0f", b"p268435455\n", b"q\x09"])
def test_a_pickle_cannot_ask_for_more_memory_than_it_has_objects(put, tmp_path):
    _zip(tmp_path / "x.pt", b"\x80\x02}" + put + b".")
    with pytest.raises(UserError, match="x.pt is damaged .* that is not there yet"):
        torch_file.load(tmp_path / "x.pt")
    _zip(tmp_path / "x.pt", b"\x80\x02}q\x00.")
    assert torch_file.load(tmp_path / "x.pt") == {}


def test_a_damaged_or_encrypted_member_is_named(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00." + bytes(100))
    whole = path.read_bytes()
    assert torch_file.load(path) == {}
    at = 30 + len("archive/data.pkl")
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(UserError, match="x.pt is damaged .*error: Error -3"):
        torch_file.load(path)
    central = whole.index(b"PK\x01\x02")  # its flags say encrypted, here and at the member
    path.write_bytes(whole[:6] + b"\x01" + whole[7 : central + 8] + b"\x01" + whole[central + 9 :])
    with pytest.raises(UserError, match="x.pt is damaged .*encrypted"):
        torch_file.load(path)


def test_damage_is_named(tmp_path):
    path = tmp_path / "x.pt"
    torch_file.save(path, np.arange(100.0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="x.pt is damaged or no file of torch.save"):
        torch_file.load(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        pickled, data = archive.read("archive/data.pkl"), archive.read("archive/data/0")
    _zip(path, pickled, [data])
    np.testing.assert_array_equal(torch_file.load(path), np.arange(100.0))
    _zip(path, pickled, [data[:-8]])  # the twin: a storage that lost a number
    with pytest.raises(UserError, match="reaches beyond its storage"):
        torch_file.load(path)
    one, none = (b"(\x8a\x01%ct" % stride for stride in (1, 0))
    assert one in pickled
    _zip(path, pickled.replace(one, none), [data[:8]])  # expand(100) of a number is no damage
    with pytest.raises(UserError, match="repeats 1 numbers .* save it with .contiguous"):
        torch_file.load(path)
    path.write_bytes(b"\x80\x02l...")
    with pytest.raises(UserError, match="is not written by torch.save; load it in the program"):
        torch_file.load(path)
