"""What containers and batch systems let a process have, of which /proc/meminfo knows nothing.

Linux's control groups, of both versions. A group has no more than any that it is in.
"""

from __future__ import annotations

import pathlib

ROOT = pathlib.Path("/sys/fs/cgroup")
OWN = pathlib.Path("/proc/self/cgroup")

MEMORY = (  # limit, use, and what files kept of it begin with, in version 2 and in version 1
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
FILES = ("inactive", "active")


def memory() -> list[tuple[int, int]]:
    """(Limit, use that cannot be given back) of each group that has a limit, in bytes."""
    found = []
    for group in _groups("memory"):
        for limit, use, prefix in MEMORY:
            allowed, used = _said(group / limit).strip(), _said(group / use).strip()
            if allowed.isdecimal() and used.isdecimal():  # not "max"
                stat = dict(line.split() for line in _said(group / "memory.stat").splitlines())
                files = [int(stat.get(f"{prefix}{kind}_file", 0)) for kind in FILES]
                found.append((int(allowed), int(used) - sum(files)))
    return found


def cores() -> list[float]:
    """How many cores' time each group has that has not all."""
    found = []
    for group in _groups("cpu"):
        quota, period = _said(group / "cpu.cfs_quota_us"), _said(group / "cpu.cfs_period_us")
        said = (_said(group / "cpu.max") or f"{quota} {period}").split()
        if len(said) == 2 and all(s.isdecimal() for s in said):  # not "max" and not -1
            found.append(int(said[0]) / int(said[1]))
    return found


def _groups(controller: str) -> list[pathlib.Path]:
    """The folders of the groups that this process is in, its own first."""
    found = []
    for line in _said(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree
            tree = ROOT
        elif controller in controllers.split(","):
            tree = ROOT / controller
        else:
            continue
        own = tree / path.lstrip("/")  # a container may see its own group as the root
        found += [p for p in (own, *own.parents) if p.is_relative_to(tree)]
    return found


def _said(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no Linux, no such group, nothing to tell
        return ""
