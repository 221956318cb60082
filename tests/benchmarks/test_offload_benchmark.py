"""``benchmarks/offload``: runs end to end without a GPU, a failing arm is a row, and what was not measured says so."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def module(name: str) -> Any:
    return importlib.import_module(f"offload.{name}")


def row_of(text: str, title: str, label: str) -> list[str]:
    """Cells of the row that begins with ``label`` in the table under ``title``."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.strip("| \n").split(" | ")] for line in section.splitlines() if line[:1] == "|"]
    (found,) = [row for row in rows if row[0] == label]
    return found


def facts(gpu: str | None) -> dict[str, Any]:
    return {"gpu": gpu, "gpu_bytes": 0, "processor": "p", "usable_cores": 2, "host_bytes": 2**34}


def cell(arm: str, size: str, tokens: int, update: float, iteration: float, **more: Any) -> dict[str, Any]:
    """A cell as it is after one measured round."""
    times = {"forward": [1.0, 1.0], "backward": [2.0, 2.0], "update": [update] * 2, "iteration": [iteration] * 2}
    one = {"milliseconds": times, "losses": [5.0, 4.0], "peak_host_bytes": 2**30, "ratio": None, "process_s": 1.0}
    found = {"arm": arm, "size": size, "tokens": tokens, "status": "measured", "reason": "", "rounds": [one | more]}
    return found


def keyed(*cells: dict[str, Any]) -> dict[str, Any]:
    return {f"{c['size']}/{c['tokens']}/{c['arm']}": c for c in cells}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a host without a GPU does")
def test_two_arms_end_to_end_and_the_rest_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = module("run")
    known = run.machine()
    monkeypatch.setattr(run, "machine", lambda: known)
    out = tmp_path / "offload.json"
    arms = ["torch_resident", "torch_overlap", "zenflow"]
    given = ["--sizes", "1b", "--tokens", "2048", "--arms", *arms, "--steps", "2", "--warmup", "1", "--rounds", "1"]
    assert run.main([*given, "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert {key: c["status"] for key, c in cells.items()} == {
        "tiny/64/torch_resident": "function check",
        "tiny/64/torch_overlap": "function check",
        "tiny/64/zenflow": "not measured",
        **{f"1b/2048/{arm}": "not measured" for arm in arms},
    }
    assert all(c["reason"].startswith("no GPU") for c in cells.values() if c["status"] == "not measured")
    # Half of the state went through buffers, the other half did not, and every loss is the same.
    overlap = cells["tiny/64/torch_overlap"]["rounds"][0]
    assert min(overlap["plan"]["elements"]["stream"], overlap["plan"]["elements"]["cpu"]) > 0
    resident = cells["tiny/64/torch_resident"]["rounds"][0]
    assert overlap["losses"][: len(resident["losses"])] == resident["losses"]
    text = out.with_suffix(".md").read_text()
    assert "a function check on the CPU, no claim of speed" in text
    row = row_of(text, "tiny, 64", "ours, plain torch, hybrid with overlap")
    assert (row[1], row[2], row[-1]) == ("function check", "–", "0")
    assert row_of(text, "1b, 2,048", "ours, plain torch, hybrid with overlap")[1] == "not measured: no GPU"
    assert "exposed update at least 3x shorter than DeepSpeed ZeRO-3 offload's: not measured" in text

    # Nothing runs twice.
    before = [c["rounds"] for c in cells.values()]
    assert run.main([*given, "--out", str(out), "--resume"]) == 0
    assert [c["rounds"] for c in json.loads(out.read_text())["cells"].values()] == before


def test_measured_cells_are_not_lost_nor_mixed_with_others(tmp_path: Path) -> None:
    record = module("record")
    path = tmp_path / "offload.json"

    def opened(seed: int, gpu: str, *, resume: bool) -> Any:
        return record.Record(path, {"gpu": gpu}, {"seed": seed}, "command", resume=resume)

    first = opened(1, "A", resume=False)
    first.data["cells"] |= keyed(cell("zero3", "4b", 2048, 1.0, 4.0) | {"status": "function check"})
    first.save()
    # Function checks are replaced: by a first piece on another machine that is told to resume too.
    assert opened(1, "B", resume=True).data["cells"] == {}
    assert opened(1, "A", resume=True).data["cells"] == first.data["cells"]
    assert opened(1, "A", resume=False).data["cells"] == {}
    first.data["cells"]["4b/2048/zero3"]["status"] = "measured"
    first.save()
    assert opened(1, "A", resume=True).data["cells"] == first.data["cells"]
    with pytest.raises(ValueError, match="holds measured cells: go on with them by --resume"):
        opened(1, "A", resume=False)
    with pytest.raises(ValueError, match="measured with arguments seed = 1, here it is 2"):
        opened(2, "A", resume=True)
    with pytest.raises(ValueError, match="measured with machine gpu = 'A', here it is 'B'"):
        opened(1, "B", resume=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a host without a GPU does")
def test_a_failing_arm_is_a_row_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("run"), "machine", lambda: facts(None))
    out = tmp_path / "offload.json"
    given = ["--sizes", "tiny", "--arms", "torch_cpu", "torch_resident", "--steps", "1", "--rounds", "2"]
    # Refused by the arm: half a sequence of 32 tokens a micro-batch.
    module("run").main([*given, "--micro-tokens", "48", "--out", str(out)])
    cells = json.loads(out.read_text())["cells"]
    for name in ("torch_cpu", "torch_resident"):
        assert cells[f"tiny/64/{name}"]["status"] == "failed"
        assert cells[f"tiny/64/{name}"]["rounds"] == []
    text = out.with_suffix(".md").read_text()
    assert row_of(text, "tiny, 64", "ours, plain torch, CPU only")[1].startswith("refused: --tokens 48")


def test_a_process_over_its_time_is_ended_with_what_it_started(tmp_path: Path) -> None:
    import subprocess

    watched = module("watched")
    code = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert watched.Watched(process, 0.0, None).wait() == watched.Watched.OVER_TIME
    assert process.returncode == -9
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of device memory: "),
        (RuntimeError("CUDA error: out of memory while pinning host memory"), "out of host memory: "),
        (ValueError("optimizer.offload needs more host memory than there is"), "out of host memory: "),
        (MemoryError(), "out of host memory: "),
        (NotImplementedError("one micro-batch"), "not supported: one micro-batch"),
        (AssertionError("only CUDA"), "refused: only CUDA"),
        (KeyError("x"), "failed: KeyError: 'x'"),
    ],
)
def test_reasons(error: Exception, start: str) -> None:
    assert module("cell").reason_of(error).startswith(start)


def test_goals_are_judged_by_medians_and_only_where_measured() -> None:
    table = module("table")
    measured = keyed(
        cell("zero3_offload", "4b", 2048, update=300.0, iteration=400.0),
        cell("engine_overlap", "4b", 2048, update=60.0, iteration=330.0),
        cell("engine_resident", "4b", 2048, update=5.0, iteration=300.0),
        cell("torch_resident", "4b", 32768, update=5.0, iteration=1010.0),
        cell("zero3", "4b", 32768, update=5.0, iteration=1000.0),
        cell("torch_overlap", "4b", 32768, update=30.0, iteration=1080.0),
    )
    lines = list(table.goals(measured))
    assert [": reached, 5.00x" in lines[0], ": NOT reached, 1.21x" in lines[1], ": reached, 1.08x" in lines[2]] == [
        True
    ] * 3
    # Times of a step that computes something else are none to judge by.
    other = measured | keyed(cell("engine_overlap", "4b", 2048, update=60.0, iteration=330.0, losses=[5.0, 3.5]))
    lines = list(table.goals(other))
    assert all(": not judged, losses differ" in line for line in lines[:2])
    assert "reached" not in "".join(lines[:2])
    assert ": reached" in lines[2]
    alone = {key: c for key, c in measured.items() if key != "4b/2048/engine_resident"}
    assert all(": not judged, losses were not compared" in line for line in list(table.goals(alone))[:2])
    del measured["4b/2048/zero3_offload"]
    assert [line.rsplit(": ", 1)[1] for line in table.goals(measured)][:2] == ["not measured", "not measured"]
    # A function check is no measurement.
    checks = {key: c | {"status": "function check"} for key, c in measured.items()}
    assert all(line.endswith(": not measured") for line in table.goals(checks))


def test_rows_tell_of_failed_rounds_ratios_and_losses() -> None:
    table = module("table")
    reference = cell("zero3", "4b", 2048, 1.0, 4.0)
    twinflow = cell("twinflow", "4b", 2048, 10.0, 20.0, ratio=0.6, losses=[5.0, 4.5]) | {"reason": "round 2: failed: x"}
    unmeasured = cell("zenflow", "4b", 2048, 0, 0) | {"status": "not measured", "reason": "not run", "rounds": []}
    cells = keyed(reference, twinflow, unmeasured)
    data = {"cells": cells, "machine": facts("GPU"), "versions": {}, "date": "d", "commands": []}
    text = table.report(data)
    row = row_of(text, "4b, 2,048", "DeepSpeed TwinFlow, best ratio 0.6 (round 2: failed: x)")
    assert (row[1], row[3], row[-1]) == ("10.0 [10.0, 10.0]", "102,400", "5.0e-01")
    label = "DeepSpeed ZenFlow (not equivalent: the update of most gradients is late)"
    assert row_of(text, "4b, 2,048", label)[1] == "not measured: not run"


def test_copies_of_a_trace() -> None:
    events = [
        {
            "cat": "gpu_memcpy",
            "name": "Memcpy HtoD (Pinned -> Device)",
            "ts": 0.0,
            "dur": 10.0,
            "args": {"bytes": 1000},
        },
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "ts": 5, "dur": 10, "args": {"bytes": 500}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": 0, "dur": 4, "args": {"bytes": 800}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "ts": 0, "dur": 4, "args": {"bytes": 9}},
        {"cat": "kernel", "name": "HtoD", "ts": 0, "dur": 4},
        {"ph": "M", "name": "process_name"},
    ]
    found = module("measure").copies_of_trace(events)
    assert found["up"] == {"bytes": 1500, "busy_s": pytest.approx(15e-6), "gb_per_s": pytest.approx(0.1)}
    assert found["down"] == {"bytes": 800, "busy_s": pytest.approx(4e-6), "gb_per_s": pytest.approx(0.2)}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=8))
def test_covered_is_the_length_of_the_union(pieces: list[tuple[int, int]]) -> None:
    union = {point for low, length in pieces for point in range(low, low + length)}
    assert module("measure").covered([(low, low + length) for low, length in pieces]) == len(union)


@pytest.mark.parametrize("name", ["tiny", "1b", "3b", "4b", "8b"])
def test_sizes_are_those_of_their_models(name: str) -> None:
    from pretrain.parallel.layers import TorchLayers

    size = module("sizes").SIZES[name]
    with torch.device("meta"):
        model = size.model().build(TorchLayers())
    assert sum(p.numel() for p in model.parameters()) == size.parameters
    published = {"1b": 1_235_814_400, "3b": 3_212_749_824, "4b": 4_022_468_096, "8b": 8_030_261_248}
    assert size.parameters == published.get(name, size.parameters)


def test_rivals_get_the_keys_that_deepspeed_knows() -> None:
    from pretrain.engines.deepspeed_import import import_deepspeed

    import_deepspeed("cpu")
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    arms = module("arms")
    for arm in arms.RIVALS:
        settings = arms.deepspeed_json(arm, 4, 4, gpu=True, ratio=0.4 if arm.by_ratio else None)
        zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
        offload = zero.offload_optimizer
        assert (offload is not None) == bool(arm.offload_optimizer)
        if arm.name == "twinflow":
            assert (offload.ratio, zero.sub_group_size) == (0.4, arms.SUBGROUP)
        if arm.name.startswith("superoffload"):
            assert (offload.super_offload, offload.pin_memory) == (True, True)
            assert settings["gradient_clipping"] == (0.0 if arm.name.endswith("noclip") else 1.0)
        if arm.name == "zenflow":
            assert zero.zenflow.update_interval == 4
        if arm.compile:
            assert CompileConfig(**settings["compile"]).offload_opt_states


def test_first_ratio_is_the_share_without_room() -> None:
    arms = module("arms")
    parameters, gib = 4_000_000_000, 2**30
    logits = 8 * 2048 * 150_000
    room = 4 * parameters + logits + 6 * gib
    assert arms.first_ratio(parameters, room, 2048, 150_000) == 1.0
    assert arms.first_ratio(parameters, room + 16 * parameters, 2048, 150_000) == 0.0
    assert arms.first_ratio(parameters, room + 16 * parameters * 0.45, 2048, 150_000) == 0.6
    assert arms.first_ratio(parameters, room - gib, 2048, 150_000) == 1.0
