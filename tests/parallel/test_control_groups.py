"""Limits of control groups, both versions, on made-up file systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.parallel.control_groups import MemoryLimit, memory_groups, memory_limits, memory_room

NAMES = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def write_group(folder: Path, version: int, limit: str, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, used_name = NAMES[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def belong_to(root: Path, lines: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_limits_count_all_the_way_up(tmp_path: Path) -> None:
    belong_to(tmp_path, "0::/slurm/job\n")
    write_group(tmp_path / "sys/fs/cgroup/slurm/job", 2, "max", 1)
    write_group(tmp_path / "sys/fs/cgroup/slurm", 2, "5000", 1200)
    assert memory_room(tmp_path) == 3800
    assert list(memory_limits(tmp_path)) == [MemoryLimit(5000, 1200, 0)]


def test_the_tightest_of_several_limits_holds(tmp_path: Path) -> None:
    belong_to(tmp_path, "0::/slurm/job\n")
    write_group(tmp_path / "sys/fs/cgroup/slurm/job", 2, "4000", 100)
    write_group(tmp_path / "sys/fs/cgroup/slurm", 2, "5000", 4900)
    assert memory_room(tmp_path) == 100


def test_caches_of_files_are_given_up_and_shared_memory_is_not(tmp_path: Path) -> None:
    belong_to(tmp_path, "0::/job\n")
    stat = "anon 300\nfile 700\nshmem 200\nactive_file 150\ninactive_file 350\nslab_reclaimable 50\n"
    write_group(tmp_path / "sys/fs/cgroup/job", 2, "1000", 1000, stat)
    assert memory_room(tmp_path) == 550


def test_version_1_counts_the_memory_controller_alone(tmp_path: Path) -> None:
    belong_to(tmp_path, "12:cpu,cpuacct:/job\n7:memory:/job\n")
    stat = "inactive_file 5\ntotal_active_file 10\ntotal_inactive_file 20\n"
    write_group(tmp_path / "sys/fs/cgroup/memory/job", 1, "900", 100, stat)
    write_group(tmp_path / "sys/fs/cgroup/memory", 1, "9223372036854771712", 100)
    assert [group.version for group in memory_groups(tmp_path)] == [1]
    assert memory_room(tmp_path) == 830


@pytest.mark.parametrize("text", [None, "", "damaged\n", "3:cpu:/job\n"])
def test_without_a_limit_nothing_is_said(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        belong_to(tmp_path, text)
    assert memory_room(tmp_path) is None
