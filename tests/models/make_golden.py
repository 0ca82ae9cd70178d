"""Make the golden files of the parity tests; needs torch, torchvision and timm.

python tests/models/make_golden.py [name of a case ...]
"""

from __future__ import annotations

import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent)]

from models import parity, torch_networks  # noqa: E402

if __name__ == "__main__":
    for case in parity.FAST + parity.SLOW:
        if not sys.argv[1:] or case.name in sys.argv[1:]:
            parity.save(case, torch_networks.outputs(case))
            print(case.name, case.golden.stat().st_size, flush=True)
