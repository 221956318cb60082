"""Checkpoints of DeepSpeed runs with offloaded states: canonical, whatever the plan, stage, size, or no offloading."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.engine_case import Case, joined, run_steps, save, state_of, torch_reference
from support.matrix import rotating
from support.offload_engine_case import OffloadCase, build, differing

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.schema import OffloadConfig
from pretrain.engines import offload_state

pytestmark = pytest.mark.distributed

FIRST = OffloadConfig(enabled=True, subgroup_size=37, fraction=0.3)
SECOND = OffloadConfig(enabled=True, subgroup_size=50, fraction=0.7, resident_fraction=0.2)


def go_on(rank: int, size: int, case: Case, root: Path, path: Path | None, steps: range) -> Any:
    """Take over ``path`` in an engine that has trained on other data, save at once, train ``steps``, save."""
    engine = build(case)
    if path is not None:
        run_steps(engine, rank, case, range(7, 8))
        engine.import_state(CheckpointReader(path))
        save(engine, root, steps.start, rank)
    results = run_steps(engine, rank, case, steps)
    save(engine, root, steps.stop, rank)
    return results


LAYOUTS = [
    (1, "bf16", "full", "low_bits"),
    (1, "fp32", "full", "full"),
    (2, "bf16", "low_bits", "full"),
    (2, "fp32", "full", "full"),
    (3, "bf16", "low_bits", "full"),
    (3, "bf16", "full", "low_bits"),
    (3, "fp32", "full", "full"),
]


@pytest.mark.parametrize(
    ("stage", "precision", "before", "after"), rotating(LAYOUTS, 4, [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]])
)
def test_another_plan_resumes_bit_for_bit(
    worker_pools: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    precision: str,
    before: str,
    after: str,
) -> None:
    pool = worker_pools(2)
    one = OffloadCase(stage, 2, precision=precision, offload=replace(FIRST, master=before))  # type: ignore[arg-type]
    two = replace(one, offload=replace(SECOND, master=after), device="late")  # type: ignore[arg-type]
    whole = pool.run(go_on, one, tmp_path / "whole", None, range(4))
    pool.run(go_on, one, tmp_path / "part", None, range(2))
    parts = pool.run(go_on, two, tmp_path / "resumed", tmp_path / "part/step_00000002", range(2, 4))
    assert parts == [rank[2:] for rank in whole]
    expected, found = (state_of(tmp_path / name / "step_00000004") for name in ("whole", "resumed"))
    assert differing(expected, found) == []


MOVES = [
    (source, target)
    for source, target in product(product((0, 1, 2, 3), (1, 2, 4), (False, True)), repeat=2)
    if source != target
    and (source[2] or target[2])
    and all(stage or not offloads for stage, _, offloads in (source, target))
]
MUST_MOVE = [((3, 2, False), (2, 1, True)), ((1, 2, True), (3, 4, False)), ((3, 4, True), (1, 2, True))]


@pytest.mark.parametrize("move", rotating(MOVES, 5, MUST_MOVE), ids=lambda move: "-".join(map(str, sum(move, ()))))
def test_any_layout_continues_any_other(worker_pools: Any, tmp_path: Path, move: tuple[Any, ...]) -> None:
    cases = []
    for (stage, size, offloads), offload in zip(move, (FIRST, SECOND), strict=True):
        cases.append(OffloadCase(stage, size, offload=offload if offloads else OffloadConfig()))
    source, target = cases
    worker_pools(source.size).run(go_on, source, tmp_path / "from", None, range(2))
    path = tmp_path / "from/step_00000002"
    results = worker_pools(target.size).run(go_on, target, tmp_path / "to", path, range(2, 6))
    assert CheckpointReader(tmp_path / "to/step_00000002").training["optimizer_scalars"] == {"step": 2.0}
    assert differing(state_of(path), state_of(tmp_path / "to/step_00000002")) == []
    trajectory, reference = joined(results), torch_reference()
    assert trajectory.losses == pytest.approx(reference.losses[2:6], rel=2e-6)
    assert trajectory.norms == pytest.approx(reference.norms[2:6], rel=2e-5)


def before_training(rank: int, size: int, case: Case, root: Path, path: Path | None, chunk: int) -> None:
    offload_state.CHUNK, kept = chunk, offload_state.CHUNK
    try:
        engine = build(case)
        if path is not None:
            run_steps(engine, rank, case, range(1))
            engine.import_state(CheckpointReader(path))
        save(engine, root, 0, rank)
    finally:
        offload_state.CHUNK = kept


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_that_has_not_begun_starts_from_full_precision(worker_pools: Any, tmp_path: Path, stage: int) -> None:
    """Also in portions that end anywhere, and when a run goes back to its beginning."""
    offloaded = OffloadCase(stage, 2, precision="bf16", offload=replace(FIRST, master="low_bits"))
    worker_pools(2).run(before_training, offloaded.without_offload(), tmp_path / "plain", None, 10**6)
    worker_pools(2).run(before_training, offloaded, tmp_path / "ours", None, 13)
    worker_pools(2).run(before_training, offloaded, tmp_path / "back", tmp_path / "plain/step_00000000", 17)
    expected = state_of(tmp_path / "plain/step_00000000")
    master = expected["master:embedding.weight"]
    assert not bool((master == master.bfloat16().float()).all())
    assert differing(expected, state_of(tmp_path / "ours/step_00000000")) == []
    assert differing(expected, state_of(tmp_path / "back/step_00000000")) == []
