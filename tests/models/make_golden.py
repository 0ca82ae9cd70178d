"""Make the golden files of the parity tests; needs torch, torchvision and timm.

python tests/models/make_golden.py [name of a case, or a pattern as 'resnet18-*' ...]

Files of cases that are no more are removed.
"""

from __future__ import annotations

import pathlib
import sys
from fnmatch import fnmatch

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from models import parity, torch_networks  # noqa: E402

if __name__ == "__main__":
    for case in parity.FAST + parity.SLOW:
        if not sys.argv[1:] or any(fnmatch(case.name, name) for name in sys.argv[1:]):
            parity.save(case, torch_networks.outputs(case))
            print(case.name, case.golden.stat().st_size, flush=True)
    for file in set(parity.GOLDEN.iterdir()) - {c.golden for c in parity.FAST + parity.SLOW}:
        file.unlink()
