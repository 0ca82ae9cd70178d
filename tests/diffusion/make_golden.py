"""Make the golden files of the parity tests; needs torch, diffusers and transformers.

python tests/diffusion/make_golden.py [name of a case, or a pattern as 'unet_*' ...]

Files of cases that are no more are removed.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from fnmatch import fnmatch

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from diffusion import parity, torch_networks  # noqa: E402

if __name__ == "__main__":
    parity.GOLDEN.mkdir(exist_ok=True)
    for case in parity.CASES:
        if not sys.argv[1:] or any(fnmatch(case.name, name) for name in sys.argv[1:]):
            with tempfile.TemporaryDirectory() as folder:
                found = torch_networks.outputs(case, pathlib.Path(folder))
                parity.save(case, pathlib.Path(folder), found)
            print(case.name, case.golden.stat().st_size, flush=True)
    for file in set(parity.GOLDEN.iterdir()) - {case.golden for case in parity.CASES}:
        file.unlink()
