"""Files of ``torch.save``, written by hand in both of its formats, without PyTorch."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np


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


def dump(found, kind, protocol=2):
    class Pickler(pickle.Pickler):
        def persistent_id(self, found):
            if isinstance(found, Storage):
                return ("storage", kind, found.key, "cpu", found.size)
            return None

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(found)
    return stream.getvalue()


def stored(state, rebuild):
    return OrderedDict((n, Stored(str(i), a, rebuild)) for i, (n, a) in enumerate(state.items()))


def zipped(state, found, kind, path, protocol=2):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dump(found, kind, protocol))
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(state.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    return path


def legacy(state, found, kind, path, protocol=2):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(p, protocol) for p in (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [
        dump(found, kind, protocol),
        pickle.dumps([str(i) for i in range(len(state))], protocol),
    ]
    parts += [struct.pack("<q", a.size) + a.tobytes() for a in state.values()]
    path.write_bytes(b"".join(parts))
    return path


def contiguous(state):
    return {name: np.ascontiguousarray(array) for name, array in state.items()}
