"""What a container or a batch system allows, from trees of files as the kernel shows them."""

from __future__ import annotations

import os

import pytest

from prism_jax import control_groups, environment

GB = 1 << 30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write files of groups, and which of them this process is in."""

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(control_groups, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(control_groups, "OWN", tmp_path / "own")
    return write


def test_a_group_has_no_more_than_those_that_it_is_in(groups):
    groups("0::/job/step\n", {
        "job/memory.max": f"{8 * GB}\n", "job/memory.current": f"{7 * GB}\n",
        "job/memory.stat": f"anon 5\ninactive_file {2 * GB}\nactive_file {GB}\n",
        "job/step/memory.max": "max\n", "job/step/memory.current": f"{GB}\n",
        "job/cpu.max": "250000 100000\n", "job/step/cpu.max": "max 100000\n",
        "other/memory.max": "4096\n", "other/memory.current": "0\n", "other/cpu.max": "1 2\n",
    })  # fmt: skip
    assert control_groups.memory() == [(8 * GB, 4 * GB)]
    assert control_groups.cores() == [2.5]


def test_version_1_has_a_tree_for_each_and_a_container_its_root(groups):
    groups("5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n3:name=systemd:/\n0::/\n", {
        "memory/memory.limit_in_bytes": f"{3 * GB}\n", "memory/memory.usage_in_bytes": f"{GB}\n",
        "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 16\ntotal_active_file 8\n",
        "cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    assert control_groups.memory() == [(3 * GB, GB - 24)]
    assert control_groups.cores() == [0.5]


@pytest.mark.parametrize("own", ["", "0::/\n", "2:cpu:/a\n1:memory:/a\n"])
def test_nothing_is_limited_where_nothing_says_so(groups, own):
    groups(own, {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"})
    assert control_groups.memory() == control_groups.cores() == []
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert environment.memory() == there > environment.free_memory() > 0


def test_a_run_keeps_to_its_group(monkeypatch):
    shares = {"memory": [], "cores": []}
    for name in shares:
        monkeypatch.setattr(control_groups, name, lambda name=name: shares[name])
    cores, held = environment.cores(), environment.used_memory() * environment.memory()
    shares["memory"] = [(GB, GB - 4096), (2 * GB, GB // 4)]
    assert environment.memory() == GB and environment.free_memory() == 4096
    assert environment.used_memory() == pytest.approx(held / GB, rel=0.05)
    shares["memory"] = [(GB, 2 * GB)]
    assert environment.free_memory() == 0
    for quota, found in ((0.5, 1), (1.0, 1), (1.5, min(2, cores)), (1e6, cores)):
        shares["cores"] = [quota]
        assert environment.cores() == found
