"""Weight files: read without PyTorch, refused with reasons, and right to the last tensor."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from prism_jax.data import weights
from prism_jax.errors import UserError
from prism_jax.models import build, import_torch

SHAPE = (16, 16, 3)


@pytest.fixture(scope="module")
def network():
    """ConvNet-D1 with BatchNorm and random weights: (variables, state dict)."""
    module = build("convnet_d1_bn", 10, width=0.0625)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    )
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: draw.normal(size=s.shape).astype(np.float32), shapes)
    return variables, import_torch.to_state_dict(variables)


def load(path, architecture="convnet_d1_bn", classes=10, shape=SHAPE, width=0.0625):
    return weights.load(str(path), architecture, classes, image_shape=shape, width=width)


def fake_torch(monkeypatch):
    """Modules with the names that torch pickles, so that tests write files without torch."""

    def module(name, **members):
        fake = types.ModuleType(name)
        for key, member in members.items():
            member.__module__, member.__qualname__ = name, key
            member.__name__ = key
            setattr(fake, key, member)
        monkeypatch.setitem(sys.modules, name, fake)
        return fake

    torch = module("torch", FloatStorage=type("FloatStorage", (), {}))
    utils = module("torch._utils", _rebuild_tensor_v2=lambda *args: args)
    return torch.FloatStorage, utils._rebuild_tensor_v2


class Stored:
    """A tensor as torch.save sees it: a view of a storage."""

    def __init__(self, key, array, rebuild, offset=0, stride=None):
        self.key, self.array, self.rebuild, self.offset = key, array, rebuild, offset
        self.stride = stride or tuple(s // array.itemsize for s in array.strides)

    def __reduce__(self):
        args = (self, self.offset, self.array.shape, self.stride, False, OrderedDict())
        return self.rebuild, (Storage(self.key, self.array.size), *args[1:])


class Storage:
    def __init__(self, key, size):
        self.key, self.size = key, size


def dump(found, kind):
    class Pickler(pickle.Pickler):
        def persistent_id(self, found):
            if isinstance(found, Storage):
                return ("storage", kind, found.key, "cpu", found.size)
            return None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(found)
    return stream.getvalue()


def stored(state, rebuild):
    return OrderedDict((n, Stored(str(i), a, rebuild)) for i, (n, a) in enumerate(state.items()))


def zipped(state, found, kind, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dump(found, kind))
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(state.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    return path


def legacy(state, found, kind, path):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(p, 2) for p in (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [dump(found, kind), pickle.dumps([str(i) for i in range(len(state))], 2)]
    parts += [struct.pack("<q", a.size) + a.tobytes() for a in state.values()]
    path.write_bytes(b"".join(parts))
    return path


def contiguous(state):
    return {name: np.ascontiguousarray(array) for name, array in state.items()}


def same(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3},
        lambda state: {"model": state, "arch": "x"},
    ],
)
def test_both_formats_and_their_wrappers(network, write, wrap, tmp_path, monkeypatch):
    variables, state = network
    state = contiguous(state)
    kind, rebuild = fake_torch(monkeypatch)
    path = write(state, wrap(stored(state, rebuild)), kind, tmp_path / "weights.pth")
    assert same(load(path), variables)


def test_views_of_a_storage(tmp_path, monkeypatch):
    kind, rebuild = fake_torch(monkeypatch)
    base = np.arange(12, dtype=np.float32)
    view = Stored("0", base[2:8].reshape(2, 3), rebuild, offset=2, stride=(1, 2))
    path = zipped({"w": base}, {"w": view}, kind, tmp_path / "view.pth")
    np.testing.assert_array_equal(
        import_torch.read_checkpoint(str(path))["w"], [[2, 4, 6], [3, 5, 7]]
    )
    beyond = Stored("0", base[2:8].reshape(2, 3), rebuild, offset=9, stride=(1, 2))
    # A stride of zero: a tensor of any size within one element.
    endless = Stored("0", np.broadcast_to(base[:1], (2**40,)), rebuild, stride=(0,))
    for wrong in (beyond, endless):
        path = zipped({"w": base}, {"w": wrong}, kind, tmp_path / "beyond.pth")
        with pytest.raises(UserError, match="beyond its storage"):
            import_torch.read_checkpoint(str(path))


def test_safetensors(network, tmp_path):
    variables, state = network
    path = tmp_path / "weights.safetensors"
    counter = {"features.1.num_batches_tracked": np.int64([5])}
    safetensors.numpy.save_file(contiguous(state) | counter, path)
    assert same(load(path), variables)


def write_safetensors(state, path):
    safetensors.numpy.save_file(contiguous(state), path)
    return path


def test_half_precision_becomes_float32(network, tmp_path):
    variables, state = network
    half = {name: array.astype(np.float16) for name, array in state.items()}
    loaded = load(write_safetensors(half, tmp_path / "half.safetensors"))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    assert same(loaded, jax.tree.map(lambda a: a.astype(np.float16).astype(np.float32), variables))


def test_bfloat16_safetensors(network, tmp_path):
    """Written by the format: a length, a header in JSON, bytes."""
    variables, state = network
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in state.items()}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in narrow.items():
        offsets = [len(body), len(body) + tensor.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        body += tensor.tobytes()
    text = json.dumps(header).encode()
    path = tmp_path / "narrow.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    expected = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), variables)
    assert same(load(path), expected)
    assert not same(expected, variables)


def test_a_hash_in_the_name_is_checked(network, tmp_path):
    path = write_safetensors(network[1], tmp_path / "plain.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(tmp_path / f"convnet-{digest[:8]}.safetensors")
    load(tmp_path / f"convnet-{digest[:8]}.safetensors")
    other = tmp_path / "convnet-00000000.safetensors"
    (tmp_path / f"convnet-{digest[:8]}.safetensors").rename(other)
    with pytest.raises(UserError, match="not what its name says.*fetch it again"):
        load(other)


def test_all_misfits_are_told_at_once(network, tmp_path):
    state = dict(network[1])
    state["extra.weight"] = state.pop("classifier.bias")
    state["features.0.weight"] = state["features.0.weight"][:, :1]
    path = write_safetensors(state, tmp_path / "misfit.safetensors")
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert "1 tensors missing from the file: classifier.bias" in message
    assert "not in the network: extra.weight" in message
    assert "features.0.weight: file (8, 1, 3, 3), network (8, 3, 3, 3)" in message


def test_another_architecture_is_recognised(tmp_path):
    """A file of ResNet-20 (CIFAR) for 100 classes, loaded as resnet32."""
    module = build("resnet20", 100)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    )
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    path = write_safetensors(import_torch.to_state_dict(zeros), tmp_path / "r.safetensors")
    with pytest.raises(UserError, match="It looks like resnet20"):
        load(path, "resnet32", 100, (32, 32, 3), 1.0)


def refused(path, **arguments):
    with pytest.raises(UserError) as caught:
        load(path, **arguments)
    return str(caught.value)


def test_another_number_of_classes_says_what_can_be_done(network, tmp_path):
    path = write_safetensors(network[1], tmp_path / "ten.safetensors")
    message = refused(path, classes=4)
    assert "head of 10 classes; 4 were asked" in message
    assert "networks.NAME.head_classes=10" in message and "class_indices" in message
    assert "leave the weights out" in message
    message = refused(path, classes=20)  # no choice of outputs makes ten of them twenty
    assert "head of 10 classes; 20 were asked" in message and "class_indices" not in message
    assert "leave the weights out" in message


def test_other_images_are_named(network, tmp_path):
    path = write_safetensors(network[1], tmp_path / "w.safetensors")
    assert "another size than 32 x 32 px" in refused(path, shape=(32, 32, 3))
    assert "It reads 3 channels; the images have 1" in refused(path, shape=(16, 16, 1))
    message = refused(path, shape=(32, 32, 1), classes=4)
    assert "another size" in message and "3 channels" in message and "10 classes" in message


def test_images_too_small_are_refused_with_the_minimum(network, tmp_path):
    path = write_safetensors(network[1], tmp_path / "w.safetensors")
    assert "resnet18 needs images of 32 px or more, with the small stem 8" in refused(
        path, architecture="resnet18", shape=(16, 224, 3)
    )
    assert "convnet_d1_bn needs images of 2 px" in refused(path, shape=(1, 1, 3))


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", [zipped, legacy])
def test_code_in_a_file_is_refused_and_not_run(write, tmp_path, monkeypatch):
    kind, _ = fake_torch(monkeypatch)
    monkeypatch.chdir(tmp_path)
    path = write({}, {"state_dict": Command()}, kind, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="system, which is not a tensor; nothing of it was run"):
        import_torch.read_checkpoint(str(path))
    assert not (tmp_path / "executed").exists()
    # The twin: an ordinary unpickler does run it.
    pickle.loads(pickle.dumps(Command()))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("write", [zipped, legacy])
def test_only_the_state_dict_is_ever_read(write, network, tmp_path, monkeypatch):
    """Beside it, lists that hold one another twice, forty deep: 2^40 entries to walk through."""
    kind, rebuild = fake_torch(monkeypatch)
    state = contiguous(network[1])
    laughs = []
    for _ in range(40):
        laughs = [laughs, laughs]
    found = {"state_dict": stored(state, rebuild), "optimizer": laughs}
    assert same(load(write(state, found, kind, tmp_path / "w.pth")), network[0])


def test_a_compressed_archive_is_refused(network, tmp_path, monkeypatch):
    kind, rebuild = fake_torch(monkeypatch)
    state = contiguous(network[1])
    path = zipped(state, stored(state, rebuild), kind, tmp_path / "w.pth")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/bomb", bytes(10**6))
    with pytest.raises(UserError, match="compressed, which torch.save never does"):
        load(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(kind, keep, network, tmp_path, monkeypatch):
    storage, rebuild = fake_torch(monkeypatch)
    state = contiguous(network[1])
    if kind == "safetensors":
        path = write_safetensors(state, tmp_path / "cut.safetensors")
    else:
        write = {"zip": zipped, "legacy": legacy}[kind]
        path = write(state, stored(state, rebuild), storage, tmp_path / "cut.pth")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match="truncated, damaged or of another kind"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no", bytes(64), b"\x80\x02."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_files_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"other.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        load(path)


def test_a_missing_file_and_a_file_without_tensors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no weight file"):
        load(tmp_path / "nowhere.pth")
    kind, _ = fake_torch(monkeypatch)
    path = zipped({}, {"epoch": 3}, kind, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        load(path)


@pytest.mark.parametrize("zip_format", [True, False])
def test_files_that_torch_wrote(zip_format, network, tmp_path):
    torch = pytest.importorskip("torch", reason="the other tests write the formats by hand")
    variables, state = network
    tensors = {n: torch.from_numpy(np.array(a)) for n, a in state.items()}
    tensors["features.1.num_batches_tracked"] = torch.tensor(3)
    tensors["classifier.weight"] = torch.nn.Parameter(tensors["classifier.weight"])
    path = tmp_path / "torch.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=zip_format)
    assert same(load(path), variables)
