"""Cores and memory of a container: control groups of versions 1 and 2, written as a toy file tree."""

import os

import pytest

from autoseg.parallel import cores, free_memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def tree(tmp_path, place, files, available=64 * GIB):
    """(proc, groups) of a machine whose process is in the groups `place`."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(place)
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\nBuffers: 5 kB\n")
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    return proc, groups


def test_without_control_groups_affinity_and_the_system_decide(tmp_path):
    assert (cores(tmp_path, tmp_path), free_memory(tmp_path, tmp_path)) == (8, 4 * GIB)
    places = tree(tmp_path, "0::/a\n", {})
    assert (cores(*places), free_memory(*places)) == (8, 64 * GIB)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("150000 100000\n", 2), ("10000 100000\n", 1), ("300000 100000\n", 3), ("max 100000\n", 8), ("9900000 100000", 8)],
)
def test_a_cpu_quota_is_rounded_up(tmp_path, quota, expected):
    assert cores(*tree(tmp_path, "0::/pod/box\n", {"pod/box/cpu.max": quota})) == expected


def test_affinity_counts_where_it_is_tighter(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert cores(*tree(tmp_path, "0::/\n", {"cpu.max": "400000 100000\n"})) == 1


def test_the_tightest_group_on_the_way_up_counts(tmp_path):
    files = {
        "pod/box/cpu.max": "max 100000\n",
        "pod/cpu.max": "500000 100000\n",
        "cpu.max": "700000 100000\n",
        "pod/box/memory.max": f"{9 * GIB}\n",
        "pod/box/memory.current": f"{1 * GIB}\n",
        "pod/memory.max": f"{10 * GIB}\n",
        "pod/memory.current": f"{7 * GIB}\n",
        "pod/memory.stat": f"anon 5\ninactive_file {2 * GIB}\n",
        "other/memory.max": "1\n",
        "other/memory.current": "1\n",
        "memory.max": "max\n",
        "memory.current": "77\n",
    }
    places = tree(tmp_path, "0::/pod/box\n", files)
    assert cores(*places) == 5
    # 10 GiB less 7 in use, 2 of which are file pages that the kernel drops when they are wanted.
    assert free_memory(*places) == 5 * GIB


def test_what_the_system_has_left_counts_where_it_is_less(tmp_path):
    files = {"memory.max": f"{9 * GIB}", "memory.current": "0"}
    assert free_memory(*tree(tmp_path, "0::/\n", files, available=GIB)) == GIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path):
    files = {"memory.max": "1000\n", "memory.current": "1200\n"}
    assert free_memory(*tree(tmp_path, "0::/\n", files)) == 0


def test_version_1_as_a_container_sees_it(tmp_path):
    # The place is named as outside the container; only the top of each mount is there.
    files = {
        "cpu/cpu.cfs_quota_us": "250000\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": f"{6 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        "memory/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}\n",
    }
    places = tree(tmp_path, "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/\n", files)
    assert (cores(*places), free_memory(*places)) == (3, 5 * GIB)


def test_version_1_without_limits(tmp_path):
    files = {
        "cpu/a/cpu.cfs_quota_us": "-1\n",
        "cpu/a/cpu.cfs_period_us": "100000\n",
        "memory/a/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/a/memory.usage_in_bytes": "4096\n",
    }
    places = tree(tmp_path, "5:memory:/a\n4:cpu:/a\n", files)
    assert (cores(*places), free_memory(*places)) == (8, 64 * GIB)


def test_both_versions_side_by_side(tmp_path):
    files = {
        "unified/a/cpu.max": "200000 100000\n",
        "memory/b/memory.limit_in_bytes": f"{3 * GIB}\n",
        "memory/b/memory.usage_in_bytes": f"{GIB}\n",
    }
    places = tree(tmp_path, "4:memory:/b\n1:name=systemd:/\n0::/a\n", files)
    assert (cores(*places), free_memory(*places)) == (2, 2 * GIB)


def test_here():
    assert 1 <= cores() <= 8
    assert free_memory() > 0
