"""Host memory for optimizer state is judged before any of it is taken, on made-up hosts."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.optim.offload.host_memory import (
    available_host_bytes,
    pinned_limit_bytes,
    require_host_memory,
    widths_of,
)

GIB = 2**30
Limit = Callable[[int, int], None]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Sets the soft limits that the process believes to have; all others are unlimited."""
    limits: dict[int, int] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits.get(which, resource.RLIM_INFINITY), -1))
    return limits.__setitem__


@pytest.fixture
def host(tmp_path: Path, limit: Limit) -> Path:
    """8 GiB free, no limit of any kind."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    (tmp_path / "proc/self/status").write_text(f"VmSize:\t  {2 * GIB // 1024} kB\nCapEff:\t0000000000000000\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    return tmp_path


def confine(host: Path, num_bytes: int) -> None:
    folder = host / "sys/fs/cgroup/job"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(str(num_bytes))
    (folder / "memory.current").write_text("0")


def refusal(host: Path, needed: dict[str, int], **given_limits: object) -> str:
    settings = {"limit_gib": None, "ranks_on_host": 1, "pinned": False, **given_limits}
    with pytest.raises(ValueError, match="nothing has been allocated") as caught:
        require_host_memory(needed, root=host, **settings)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_tightest_bound_counts(host: Path, limit: Limit) -> None:
    assert available_host_bytes(host) == 8 * GIB
    limit(resource.RLIMIT_AS, 7 * GIB)
    assert available_host_bytes(host) == 5 * GIB
    confine(host, 3 * GIB)
    assert available_host_bytes(host) == 3 * GIB


def test_a_host_that_tells_nothing_refuses_nothing(tmp_path: Path, limit: Limit) -> None:
    assert available_host_bytes(tmp_path) is None
    require_host_memory({"state": 2**60}, limit_gib=None, ranks_on_host=8, pinned=True, root=tmp_path)


def test_this_host_tells() -> None:
    found = available_host_bytes()
    assert found is None or found > 0


def test_pinning_is_limited_by_locked_memory_unless_the_driver_does_not_count_it(host: Path, limit: Limit) -> None:
    assert pinned_limit_bytes(host) is None
    limit(resource.RLIMIT_MEMLOCK, 8 << 20)
    assert pinned_limit_bytes(host) == 8 << 20
    status = host / "proc/self/status"
    status.write_text("CapEff:\t0000000000004000\n")
    assert pinned_limit_bytes(host) is None
    status.write_text("CapEff:\t000001ffffffbfff\n")
    assert pinned_limit_bytes(host) == 8 << 20
    (host / "proc/driver/nvidia").mkdir(parents=True)
    (host / "proc/driver/nvidia/version").write_text("NVRM version\n")
    assert pinned_limit_bytes(host) is None


def test_a_refusal_has_the_table_what_is_there_and_the_way_out(host: Path, limit: Limit) -> None:
    text = refusal(host, {"moments": 4 * GIB, "master weights": 2 * GIB, "buffers": 0}, ranks_on_host=2)
    assert re.search(r"moments +4\.000 GiB\n", text)
    assert re.search(r"2 ranks on this host +12\.000 GiB\n", text)
    assert "buffers  " not in text
    assert "8.000 GiB are free for 2 ranks on this host together, 4.000 GiB too little" in text
    for way in ("master=low_bits", "more ranks or nodes", "fewer ranks"):
        assert way in text
    # Without a device there is no other place for it.
    assert "resident_fraction" not in text
    assert "resident_fraction" in refusal(host, {"moments": 40 * GIB}, pinned=True)
    assert "host_memory_gib" not in text


def test_all_that_is_too_small_is_named_at_once(host: Path, limit: Limit) -> None:
    limit(resource.RLIMIT_MEMLOCK, GIB)
    limit(resource.RLIMIT_AS, 3 * GIB)
    text = refusal(host, {"state": 9 * GIB}, limit_gib=4.5, pinned=True)
    assert text.count("Found: ") == 4
    for shown in ("allows a rank 4.500 GiB, 4.500", "8.000 GiB are free for this rank, 1.000", "(ulimit -v), 8.000"):
        assert shown in text
    assert "may pin 1.000 GiB (ulimit -l), 8.000 GiB too little" in text
    assert "ulimit -l unlimited" in text
    # Memory that is not pinned is not held against that limit.
    assert "ulimit -l" not in refusal(host, {"state": 9 * GIB}, limit_gib=4.5)


@given(
    needed=st.lists(st.integers(0, 4 * GIB), min_size=1, max_size=4),
    ranks=st.integers(1, 4),
    limit_gib=st.none() | st.floats(0.5, 16),
)
def test_it_refuses_exactly_what_does_not_fit(
    tmp_path_factory: pytest.TempPathFactory, needed: list[int], ranks: int, limit_gib: float | None
) -> None:
    root = tmp_path_factory.getbasetemp() / "one host"
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemAvailable: {8 * GIB // 1024} kB\n")
    fits = sum(needed) * ranks <= 8 * GIB and (limit_gib is None or sum(needed) <= limit_gib * GIB)
    parts = {f"part {i}": size for i, size in enumerate(needed)}
    try:
        require_host_memory(parts, limit_gib=limit_gib, ranks_on_host=ranks, pinned=False, root=root)
    except ValueError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize(
    ("precision", "master", "state", "weight", "down"),
    [("fp32", "full", 8, 4, True), ("bf16", "full", 12, 2, False), ("bf16", "low_bits", 10, 2, True)],
)
def test_widths_follow_from_precision_and_storage(
    precision: str, master: str, state: int, weight: int, down: bool
) -> None:
    found = widths_of(precision, master)
    assert (found.state, found.gradient, found.weight, found.weight_down) == (state, 4, weight, down)
