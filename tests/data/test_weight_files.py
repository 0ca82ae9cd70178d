"""Weight files: read without PyTorch, refused with reasons, and right to the last tensor."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization, traverse_util
from helpers.networks import random_variables
from helpers.torch_files import Stored, contiguous, fake_torch, legacy, stored, zipped

from prism_jax.data import weight_files, weights
from prism_jax.data.weight_files import torch_files
from prism_jax.errors import UserError
from prism_jax.models import build, import_torch

SHAPE = (16, 16, 3)


@pytest.fixture(scope="module")
def network():
    """ConvNet-D1 with BatchNorm and random weights: (variables, state dict)."""
    variables = random_variables(build("convnet_d1_bn", 10, width=0.0625), SHAPE, 0)
    return variables, import_torch.to_state_dict(variables)


def load(path, said=None, **form):
    form = {"architecture": "convnet_d1_bn", "width": 0.0625, **form}
    say = print if said is None else said.append
    return weights.load(str(path), num_classes=10, image_shape=SHAPE, say=say, **form)


def refused(path, **form):
    with pytest.raises(UserError) as caught:
        load(path, **form)
    return str(caught.value)


def read_all(path):
    """A file's tensors, whatever network they are of."""
    contents = weight_files.read(str(path))
    return {".".join(p): contents.array(tensor) for p, tensor in contents.tensors.items()}


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
    np.testing.assert_array_equal(read_all(path)["w"], [[2, 4, 6], [3, 5, 7]])
    beyond = Stored("0", base[2:8].reshape(2, 3), rebuild, offset=9, stride=(1, 2))
    # A stride of zero: a tensor of any size within one element.
    endless = Stored("0", np.broadcast_to(base[:1], (2**40,)), rebuild, stride=(0,))
    expand = "repeats 12 numbers .* save it with .contiguous"
    for wrong, said in ((beyond, "beyond its storage"), (endless, expand)):
        path = zipped({"w": base}, {"w": wrong}, kind, tmp_path / "beyond.pth")
        with pytest.raises(UserError, match=said):
            read_all(path)


def test_safetensors(network, tmp_path):
    variables, state = network
    path = tmp_path / "weights.safetensors"
    counter = {"features.1.num_batches_tracked": np.int64([5])}
    safetensors.numpy.save_file(contiguous(state) | counter, path)
    assert same(load(path), variables)


def write_safetensors(state, path):
    safetensors.numpy.save_file(contiguous(state), path)
    return path


def with_header(path, entries):
    """A safetensors file by its format: the header's length, the header, the tensors' bytes."""
    header, body = {}, b""
    for name, (kind, array) in entries.items():
        place = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": place}
        body += array.tobytes()
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)
    return path


def test_bfloat16_is_read_to_the_bit(network, tmp_path):
    bits = np.array([0x3F80, 0xC020, 0x4049, 0x0001, 0xFF80], np.uint16)
    path = with_header(tmp_path / "bits.safetensors", {"w": ("BF16", bits)})
    wanted = np.float32([1, -2.5, 3.140625, 2.0**-133, -np.inf])
    np.testing.assert_array_equal(read_all(path)["w"].astype(np.float32), wanted)
    # The twin: the same bits are other numbers in the other half precision.
    path = with_header(tmp_path / "half.safetensors", {"w": ("F16", bits)})
    assert read_all(path)["w"].astype(np.float32)[0] == 1.875


@pytest.mark.parametrize(
    ("kind", "dtype"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F64", np.float64)]
)
def test_other_precisions_become_float32(kind, dtype, network, tmp_path):
    variables, state = network
    cast = {n: (kind, np.ascontiguousarray(a).astype(dtype)) for n, a in state.items()}
    loaded = load(with_header(tmp_path / "w.safetensors", cast))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    assert same(loaded, jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), variables))


@pytest.mark.parametrize(
    ("kind", "dtype", "named"),
    [
        ("F8_E4M3", ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        ("F8_E5M2", ml_dtypes.float8_e5m2, "float8_e5m2"),
        ("I8", np.int8, "int8"),
        ("F8_E8M0", np.uint8, "format F8_E8M0"),
    ],
)
def test_quantised_weights_are_named_and_refused(kind, dtype, named, network, tmp_path):
    cast = {n: (kind, np.ascontiguousarray(a).astype(dtype)) for n, a in network[1].items()}
    assert named in refused(with_header(tmp_path / "w.safetensors", cast))


def test_half_precision_in_a_pth(network, tmp_path, monkeypatch):
    fake_torch(monkeypatch)
    torch = sys.modules["torch"]
    torch.BFloat16Storage = type("BFloat16Storage", (), {"__module__": "torch"})
    torch.BFloat16Storage.__qualname__ = "BFloat16Storage"
    rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
    state = {n: a.astype(ml_dtypes.bfloat16) for n, a in contiguous(network[1]).items()}
    for write in (zipped, legacy):
        path = write(state, stored(state, rebuild), torch.BFloat16Storage, tmp_path / "w.pth")
        wanted = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), network[0])
        assert same(load(path), wanted)


def in_shards(folder, state):
    names = sorted(state)
    parts = {"m-00001-of-00002.safetensors": names[:3], "m-00002-of-00002.safetensors": names[3:]}
    for file, part in parts.items():
        write_safetensors({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def test_shards_are_read_by_their_index(network, tmp_path):
    path = in_shards(tmp_path, network[1])
    before = weights.digest(path)
    assert same(load(path), network[0])
    # One of them alone is no network; its content counts in the digest of all.
    assert "missing from the file" in refused(tmp_path / "m-00001-of-00002.safetensors")
    other = {name: array + 1 for name, array in network[1].items()}
    in_shards(tmp_path, other)
    assert weights.digest(path) != before
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    assert "m-00002-of-00002.safetensors, which is not beside it" in refused(path)
    path.write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    assert "not a file beside it" in refused(path)
    path.write_text("[]")
    assert "no index of shards" in refused(path)


def test_digits_in_a_name_are_a_hint_and_no_more(network, tmp_path):
    path = write_safetensors(network[1], tmp_path / "plain.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    praise, remark = "as its name says", "is not the beginning of its SHA-256"
    for name, wanted in (
        (f"convnet-{digest[:8]}.safetensors", praise),
        (f"convnet-{digest}.safetensors", praise),
        (f"convnet-{digest[:7]}.safetensors", None),  # seven digits promise nothing
        (f"convnet_{digest[:8]}.safetensors", None),
        ("convnet-20241105.safetensors", remark),
        (f"convnet-{digest[1:9]}.safetensors", remark),
    ):
        path = path.rename(tmp_path / name)
        said = []
        assert same(load(path, said), network[0])
        assert len(said) == (wanted is not None) and (not said or wanted in said[0]), name
    # Where something else is wrong as well, it may be why.
    path = path.rename(tmp_path / "convnet-20241105.safetensors")
    assert "20241105 in its name is not the beginning" in refused(path, width=0.125)
    path.write_bytes(path.read_bytes()[:-9])
    message = refused(path)
    assert "truncated" in message and "20241105 in its name is not the beginning" in message


class Arguments(dict):
    """As EasyDict and Lightning's AttributeDict: a dict with attributes."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self


class Unknown:
    __slots__ = ("lr", "names")

    def __init__(self):
        self.lr, self.names = 0.1, ["a", "b"]


BESIDE = {
    "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1, 2])),
    "best": np.float64(91.2),
    "history": [np.float32(i) for i in range(3)],
    "scheduler": {"milestones": collections.Counter([30, 60]), "_step_count": 5},
    "config": Arguments(model="x", inner=Arguments(a=1)),
    "object": Unknown(),
    "kept": collections.defaultdict(list, {"a": [1]}),
    "queue": collections.deque([1, 2], maxlen=3),
    "partial": functools.partial(int, base=2),
    "path": pathlib.PurePosixPath("a/b"),
    "date": datetime.datetime(2024, 11, 5),
    "sets": ({1, 2}, frozenset([3]), slice(1, 2), complex(1, 2), 10**40, bytearray(b"x")),
    "function": len,
    "class": Unknown,
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("write", [zipped, legacy])
def test_whatever_is_beside_the_weights_is_skipped(write, protocol, network, tmp_path, monkeypatch):
    kind, rebuild = fake_torch(monkeypatch)
    state = contiguous(network[1])
    found = {**BESIDE, "model": stored(state, rebuild)}
    path = write(state, found, kind, tmp_path / "w.pth", protocol)
    said = []
    assert same(load(path, said), network[0])
    assert any("argparse.Namespace" in line and "nothing of that was run" in line for line in said)


@pytest.mark.parametrize("wrap", [Arguments, collections.OrderedDict, collections.UserDict])
def test_a_state_dict_inside_another_kind_of_dict(wrap, network, tmp_path, monkeypatch):
    kind, rebuild = fake_torch(monkeypatch)
    state = contiguous(network[1])
    path = zipped(state, wrap(model=stored(state, rebuild)), kind, tmp_path / "w.pth")
    assert same(load(path), network[0])


def test_arrays_of_numpy_in_a_pickle(network, tmp_path, monkeypatch):
    kind, _ = fake_torch(monkeypatch)
    arrays = {n: np.array(a, order="F") for n, a in network[1].items()}
    arrays["classifier.bias"] = arrays["classifier.bias"].astype(">f4")
    assert same(load(zipped({}, {"model": arrays}, kind, tmp_path / "w.pth")), network[0])
    for protocol in (2, 3, 4, 5):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol))
        assert same(load(tmp_path / "w.pkl"), network[0])


def as_module(monkeypatch, state, rebuild):
    """A module as torch.save pickles it whole: objects whose state holds those below them."""

    class Module:
        def __init__(self):
            self._parameters, self._buffers, self._modules = {}, {}, {}
            self._non_persistent_buffers_set, self.training = set(), False

    fake = types.ModuleType("somewhere")
    Module.__module__, Module.__qualname__, fake.Module = "somewhere", "Module", Module
    monkeypatch.setitem(sys.modules, "somewhere", fake)
    root = Module()
    for name, tensor in stored(state, rebuild).items():
        *above, leaf = name.split(".")
        at = root
        for part in above:
            at = at._modules.setdefault(part, Module())
        (at._buffers if leaf.startswith("running_") else at._parameters)[leaf] = tensor
    table = Stored("0", state[next(iter(state))], rebuild)
    root._buffers["table"] = table
    root._non_persistent_buffers_set.add("table")
    return root


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": None, "ema": m}])
@pytest.mark.parametrize("write", [zipped, legacy])
def test_a_module_that_was_pickled_whole(write, wrap, network, tmp_path, monkeypatch):
    kind, rebuild = fake_torch(monkeypatch)
    state = contiguous(network[1])
    found = wrap(as_module(monkeypatch, state, rebuild))
    path = write(state, found, kind, tmp_path / "w.pth")
    monkeypatch.delitem(sys.modules, "somewhere")
    assert same(load(path), network[0])
    assert "somewhere" not in sys.modules


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


COMMAND = text("open('executed', 'w').close()")
HOSTILE = {
    "REDUCE": b"cbuiltins\nexec\n" + COMMAND + b"\x85R.",
    "INST": b"(" + COMMAND + b"ibuiltins\nexec\n.",
    "OBJ": b"(cbuiltins\nexec\n" + COMMAND + b"o.",
    "NEWOBJ": b"\x80\x02chostile\nRuns\n" + COMMAND + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04chostile\nRuns\n" + COMMAND + b"\x85}\x92.",
    "STACK_GLOBAL": b"\x80\x04" + text("builtins") + text("exec") + b"\x93" + COMMAND + b"\x85R.",
    "BUILD": b"chostile\nState\n)R" + COMMAND + b"b.",
    "SETITEM": b"chostile\nState\n)R" + COMMAND + b"Ns.",
    "SETITEMS": b"chostile\nState\n)R(" + COMMAND + b"Nu.",
    "APPEND": b"chostile\nState\n)R" + COMMAND + b"a.",
    "APPENDS": b"chostile\nState\n)R(" + COMMAND + b"e.",
    "ADDITEMS": b"\x80\x04chostile\nState\n)R(" + COMMAND + b"\x90.",
    "a call of a result": b"cbuiltins\ngetattr\nchostile\nState\n"
    + text("run") + b"\x86R" + COMMAND + b"\x85R.",
    "import": b"chostile_when_imported\nname\n.",
}  # fmt: skip
HOSTILE_MODULE = """
def run(text): exec(text)
class Runs:
    def __new__(cls, text): exec(text)
class State:
    run = staticmethod(run)
    def __setstate__(self, text): exec(text)
    def __setitem__(self, key, value): exec(key)
    def append(self, text): exec(text)
    def extend(self, texts): exec(texts[0])
    add = append
"""


@pytest.mark.parametrize("instruction", HOSTILE)
def test_no_instruction_of_a_pickle_runs_anything(instruction, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile.py").write_text(HOSTILE_MODULE)
    (tmp_path / "hostile_when_imported.py").write_text("name = open('executed', 'w').close()")
    pickled = HOSTILE[instruction]
    found = torch_files.unpickle(io.BytesIO(pickled))[0]
    assert isinstance(found, torch_files.Inert) or issubclass(found, torch_files.Inert)
    assert not (tmp_path / "executed").exists()
    assert not {"hostile", "hostile_when_imported"} & sys.modules.keys()
    # The twin: an ordinary unpickler does run it.
    try:
        pickle.loads(pickled)
    finally:
        for name in ("hostile", "hostile_when_imported"):
            sys.modules.pop(name, None)
    assert (tmp_path / "executed").exists()


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", [zipped, legacy])
def test_a_hostile_file_gives_its_weights_and_no_more(write, network, tmp_path, monkeypatch):
    kind, rebuild = fake_torch(monkeypatch)
    monkeypatch.chdir(tmp_path)
    state = contiguous(network[1])
    found = {"model": stored(state, rebuild), "evil": Command()}
    said = []
    assert same(load(write(state, found, kind, tmp_path / "evil.pth"), said), network[0])
    assert any("system; nothing of that was run" in line for line in said)
    message = refused(write({}, {"state_dict": Command()}, kind, tmp_path / "only.pth"))
    assert "holds no tensors" in message and "system, of which nothing was run" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "put", [b"r\xff\xff\xff\xff", b"p4294967295\n", b"r\xff\xff\xff\x0f", b"q\x09"]
)
def test_a_pickle_cannot_ask_for_more_memory_than_it_has_objects(put, tmp_path):
    """The unpickler's table has as many entries as the largest number: 64 GiB for five bytes."""
    with pytest.raises(pickle.UnpicklingError, match="that is not there yet"):
        torch_files.unpickle(io.BytesIO(b"\x80\x02}" + put + b"."))
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}" + put + b".")
    assert "truncated, damaged" in refused(tmp_path / "w.pkl")


def test_a_pickle_cannot_change_what_reads_it():
    """State that is set on what a pickle may name: refused or ignored, and not kept."""
    for module, name in torch_files._KNOWN:
        pickled = f"c{module}\n{name}\n".encode() + b"}" + text("seen") + b"I1\nsb."
        try:
            torch_files.unpickle(io.BytesIO(pickled))
        except TypeError:
            pass
        assert not hasattr(torch_files._KNOWN[module, name], "seen")


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
    assert ("truncated, damaged or of another kind" if keep else "it is empty") in refused(path)


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
    assert "holds no tensors" in refused(path)


def flat(tree):
    """A tree's arrays under "a/b/c"."""
    return {n: np.asarray(a) for n, a in traverse_util.flatten_dict(tree, sep="/").items()}


def trained(variables):
    """A TrainState: Adam's moments have the parameters' names."""
    zeros = jax.tree.map(np.zeros_like, variables["params"])
    state = {"step": np.int32(3), "opt_state": {"0": {"mu": zeros, "nu": zeros}}}
    return {**variables, **state}


@pytest.mark.parametrize(
    "wrap", [lambda v: v, trained, lambda v: {"target": trained(v)}, lambda v: {"model": v}]
)
def test_flax_trees_of_our_modules(wrap, network, tmp_path):
    tree = wrap(network[0])
    (tmp_path / "w.msgpack").write_bytes(serialization.to_bytes(tree))
    np.savez(tmp_path / "w.npz", **flat(tree))
    np.savez_compressed(tmp_path / "small.npz", **flat(tree))
    safetensors.numpy.save_file(flat(tree), tmp_path / "w.safetensors")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(tree))
    for name in ("w.msgpack", "w.npz", "small.npz", "w.safetensors", "w.pkl"):
        assert same(load(tmp_path / name), network[0]), name


def test_flax_trees_in_bfloat16(network, tmp_path):
    half = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), network[0])
    wanted = jax.tree.map(lambda a: a.astype(np.float32), half)
    (tmp_path / "w.msgpack").write_bytes(serialization.to_bytes(half))
    np.savez(tmp_path / "w.npz", **flat(half))
    assert same(load(tmp_path / "w.msgpack"), wanted) and same(load(tmp_path / "w.npz"), wanted)


def test_names_of_pytorch_in_an_npz(network, tmp_path):
    np.savez(tmp_path / "w.npz", **network[1])
    assert same(load(tmp_path / "w.npz"), network[0])


class Encoder(nn.Module):
    """A vision transformer of Flax's own layers, with the names of its published weights."""

    second: int  # numbers of the second norm, the attention and the MLP: two code bases differ
    attention: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        for block in range(2):
            y = nn.LayerNorm(epsilon=1e-6, name=f"encoderblock_{block}/LayerNorm_0")(x)
            name = f"encoderblock_{block}/MultiHeadDotProductAttention_{self.attention}"
            x = x + nn.MultiHeadDotProductAttention(num_heads=3, name=name)(y, y)
            y = nn.LayerNorm(epsilon=1e-6, name=f"encoderblock_{block}/LayerNorm_{self.second}")(x)
            name = f"encoderblock_{block}/MlpBlock_{self.mlp}"
            y = nn.Dense(4 * x.shape[-1], name=f"{name}/Dense_0")(y)
            x = x + nn.Dense(x.shape[-1], name=f"{name}/Dense_1")(nn.gelu(y, approximate=False))
        return nn.LayerNorm(epsilon=1e-6, name="encoder_norm")(x)


class FlaxViT(nn.Module):
    encoder: tuple[int, int, int]

    @nn.compact
    def __call__(self, images_BHWC):
        x = nn.Conv(192, (16, 16), (16, 16), padding="VALID", name="embedding")(images_BHWC)
        x = x.reshape(len(x), -1, 192)
        draw = nn.initializers.normal(1.0)
        token = self.param("cls", draw, (1, 1, 192))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("pos_embedding", draw, (1, x.shape[1], 192))
        return nn.Dense(10, name="head")(Encoder(*self.encoder, name="Transformer")(x)[:, 0])


@pytest.mark.parametrize(("encoder", "inside"), [((2, 1, 3), True), ((1, 0, 0), False)])
def test_published_flax_vision_transformers_are_the_same_network(encoder, inside, tmp_path):
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    module = FlaxViT(encoder)
    variables = random_variables(module, (32, 32, 3), 0)
    variables = jax.tree.map(lambda a: (0.2 * a).astype(np.float32), variables)
    wanted = np.asarray(jax.jit(module.apply)(variables, images))
    tree = {name.removeprefix("params/"): array for name, array in flat(variables).items()}
    if inside:  # where the older one keeps it
        tree["Transformer/posembed_input/pos_embedding"] = tree.pop("pos_embedding")
    else:
        tree = {f"opt/target/params/{name}": array for name, array in tree.items()}
    form = {"depth": 1 / 6}
    ours = jax.jit(build("vit_tiny_patch16_224", 10, **form).apply)

    def logits(tree):
        np.savez(tmp_path / "vit.npz", **tree)
        path, shape = str(tmp_path / "vit.npz"), (32, 32, 3)
        loaded = weights.load(path, "vit_tiny_patch16_224", 10, image_shape=shape, **form)
        return np.asarray(ours(loaded, images))

    scale = wanted.std()
    np.testing.assert_allclose(logits(tree) / scale, wanted / scale, atol=1e-4)
    # The twin: queries and values change places.
    query, value = (next(n for n in tree if f"/{part}/kernel" in n) for part in ("query", "value"))
    swapped = {**tree, query: tree[value], value: tree[query]}
    assert np.abs(logits(swapped) - wanted).max() / scale > 1e-2


def test_a_flax_tree_of_other_modules_is_called_one(tmp_path):
    tree = {
        "params/stem/root_conv/kernel": np.ones((7, 7, 3, 4), np.float32),
        "params/stages/0/gn1/scale": np.ones(4, np.float32),
        "params/stages/0/gn1/bias": np.ones(4, np.float32),
    }
    np.savez(tmp_path / "bit.npz", **tree)
    nested = serialization.msgpack_serialize(traverse_util.unflatten_dict(tree, sep="/"))
    (tmp_path / "bit.msgpack").write_bytes(nested)
    for name, kind in (("bit.npz", "NumPy .npz"), ("bit.msgpack", "Flax msgpack")):
        message = refused(tmp_path / name)
        assert f"Flax tree ({kind}) of modules that are not prism_jax's" in message
        assert "PyTorch weights" in message
    np.savez(tmp_path / "objects.npz", w=np.array({"a": 1}, dtype=object))
    assert "pickled objects" in refused(tmp_path / "objects.npz")


def test_damaged_flax_files_are_refused(network, tmp_path):
    data = serialization.to_bytes(network[0])
    for keep in (0.01, 0.5, 0.99):
        (tmp_path / "w.msgpack").write_bytes(data[: int(len(data) * keep)])
        assert "truncated, damaged" in refused(tmp_path / "w.msgpack")


def zip_of(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("w.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "Keras or HDF5"),
        ("w.keras", zip_of("config.json", "model.weights.h5"), "Keras"),
        ("w.gguf", b"GGUF\x03\0\0\0", "GGUF"),
        ("w.bin", b"\x08\x07\x12\x07pytorch" + bytes(9), "ONNX"),
        ("w.bin", b"\x08\x0a\x3a\x21\x0a\x0c\x0a\x01x\x12" + bytes(9), "ONNX"),
        ("w.tflite", b"\x1c\0\0\0TFL3" + bytes(9), "TensorFlow Lite"),
        ("m.ckpt.index", bytes(40) + bytes.fromhex("57fb808b247547db"), "TensorFlow checkpoint"),
        ("m.ckpt.data-00000-of-00001", bytes(40), "TensorFlow checkpoint"),
        ("checkpoint", b'model_checkpoint_path: "m"', "TensorFlow checkpoint"),
        ("w.npy", b"\x93NUMPY\x01\0" + bytes(9), "single NumPy array"),
        ("w.pth", b"<!DOCTYPE html><html>", "web page"),
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("w.pth.gz", b"\x1f\x8b\x08" + bytes(9), "gzip"),
        ("w.tar", bytes(257) + b"ustar\x0000" + bytes(99), "tar archive"),
        ("w.zip", zip_of("a/resnet18.pth"), "a/resnet18.pth in it"),
    ],
)
def test_other_kinds_are_called_what_they_are(name, data, what, tmp_path):
    (tmp_path / name).write_bytes(data)
    message = refused(tmp_path / name)
    assert what in message and str(tmp_path / name) in message and "damaged" not in message


def test_parts_of_tensorflow_are_recognised_by_what_lies_beside(tmp_path):
    (tmp_path / "m.ckpt.index").write_bytes(bytes(9))
    assert "TensorFlow checkpoint" in refused(tmp_path / "m.ckpt")
    (tmp_path / "saved_model.pb").write_bytes(b"x")
    assert "TensorFlow SavedModel" in refused(tmp_path)


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
    beside = {"args": argparse.Namespace(device=torch.device("cpu")), "dtype": torch.float16}
    torch.save({"model": tensors, **beside}, path, _use_new_zipfile_serialization=zip_format)
    assert same(load(path), variables)


def test_modules_that_torch_wrote(network, tmp_path):
    torch = pytest.importorskip("torch", reason="another test writes a module by hand")

    class Net(torch.nn.Sequential):
        def __init__(self):
            nn, width = torch.nn, 8
            parts = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            features = nn.Sequential(*parts, nn.AvgPool2d(2))
            linear = nn.Linear(64 * width, 10)
            super().__init__(
                collections.OrderedDict(features=features, flat=nn.Flatten(), classifier=linear)
            )

    Net.__qualname__, Net.__module__ = "Net", "__main__"
    net = Net().eval()
    net.load_state_dict(
        {n: torch.from_numpy(np.array(a)) for n, a in network[1].items()}, strict=False
    )
    traced = torch.jit.trace(net, torch.zeros(1, 3, 16, 16))
    traced.save(str(tmp_path / "script.pt"))
    assert same(load(tmp_path / "script.pt"), network[0])
    sys.modules["__main__"].Net = Net
    try:
        for zip_format in (True, False):
            torch.save(net, tmp_path / "w.pt", _use_new_zipfile_serialization=zip_format)
            assert same(load(tmp_path / "w.pt"), network[0])
    finally:
        del sys.modules["__main__"].Net
