"""``pretrain offload``: plans without tensors, the kernel of this machine, and what those who ask wrongly are told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.optim.offload.constants import Constants
from pretrain.optim.offload.cpu_adamw import LEVELS, kernel_level

RATES = Constants(
    h2d=50e9,
    d2h=50e9,
    h2d_duplex=40e9,
    d2h_duplex=40e9,
    link_with_cpu=0.9,
    cpu_adam=2e9,
    cpu_adam_with_link=1.5e9,
    gpu_adam=100e9,
)
BAD_RATES = [
    "",
    "[1]",
    '{"h2d": 1e9}',
    '{"constants": 3}',
    *(json.dumps({**asdict(RATES), name: value}) for name, value in (("cpu_adam", -1), ("latency", "low"), ("d2h", 0))),
]
FLAT = ["offload", "plan", "--parameters", "1e9", "train.precision=bf16"]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*FLAT, *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*FLAT, *arguments]) == 2
    return capsys.readouterr().err


def test_a_plan_places_every_element_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "optimizer.offload.subgroup_size=70000000")
    rows = found["subgroups"]
    assert sum(row["elements"] for row in rows) == found["elements"] == 10**9
    assert sorted([*found["device_order"], *found["cpu_order"]]) == [row["subgroup"] for row in rows]
    on_device = sum(row["elements"] for row in rows if row["place"] == "stream")
    assert found["fraction"] == pytest.approx(on_device / 10**9)
    assert found["predicted"]["exposed_s"] >= found["predicted"]["bound_s"] > 0


@pytest.mark.parametrize(
    ("overrides", "state"),
    [([], 12), (["optimizer.offload.master=low_bits"], 10), (["train.precision=fp32"], 8)],
)
def test_memory_follows_from_what_is_stored(
    capsys: pytest.CaptureFixture[str], overrides: list[str], state: int
) -> None:
    found = planned(capsys, *overrides, "optimizer.offload.fraction=1.0")
    assert found["widths"]["state"] == state
    assert sum(found["host_bytes"].values()) == state * 10**9
    assert found["device_bytes"]["buffers"] == 3 * state * 10**8


def test_ranks_share_the_state_as_their_engine_does(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = ["launcher=slurm", "launcher.num_processes=16", "launcher.num_nodes=2", "train.global_batch_size=64"]
    zero = planned(capsys, *ranks, "engine.zero_stage=3")
    assert (zero["elements"], zero["on_node"], zero["weights"]) == (62_500_000, 8, 62_500_000)
    two = planned(capsys, *ranks, "engine.zero_stage=2")
    assert (two["elements"], two["weights"], two["gradients"]) == (62_500_000, 10**9, 62_500_000)


def test_more_of_the_device_hides_more(capsys: pytest.CaptureFixture[str]) -> None:
    alone = planned(capsys)
    beside = planned(capsys, "--device-memory", "80", "--tokens", "32768")
    assert beside["window"]["backward_s"] == pytest.approx(2 * 1e9 * 32768 / 400e12)
    assert beside["early_prefetches"] > 0 == alone["early_prefetches"]
    assert beside["predicted"]["exposed_s"] < alone["predicted"]["exposed_s"]
    without = planned(capsys, "--device-memory", "80", "--tokens", "32768", "optimizer.offload.overlap=false")
    assert without["early_prefetches"] == 0


@pytest.mark.parametrize("about", [None, {"host": "node7", "device": "a GPU"}])
def test_rates_come_from_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, about: dict[str, str] | None
) -> None:
    file = tmp_path / "rates.json"
    rates = asdict(RATES)
    file.write_text(json.dumps(rates if about is None else {"constants": rates, "measured": about}))
    found = planned(capsys, "--constants", str(file))
    assert found["constants"] == rates
    assert str(file) in found["constants_source"]
    assert ("node7, a GPU" in found["constants_source"]) == (about is not None)


def test_what_a_probe_saves_is_what_a_plan_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "rates.json"
    arguments = ["offload", "probe", "--device", "cpu", "--seconds", "0.05", "--threads", "1"]
    assert main([*arguments, "--save", str(file), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured.pop("device") == "cpu"
    assert all(measured[name] > 0 for name in measured if name != "latency")
    assert planned(capsys, "--constants", str(file))["constants"] == measured


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:1", "cuda:-1"])
def test_a_probe_of_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert main(["offload", "probe", "--device", device]) == 2
    assert f"--device {device}" in capsys.readouterr().err


@pytest.mark.parametrize("text", BAD_RATES)
def test_a_file_that_holds_no_rates_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    file = tmp_path / "rates.json"
    file.write_text(text)
    error = refused(capsys, "--constants", str(file))
    assert str(file) in error
    assert "pretrain offload probe" in error


def test_refusals_name_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert "published-h100" in refused(capsys, "--constants", "nowhere.json")
    text = refused(capsys, "optimizer.offload.fraction=2", "engine.zero_stage=0")
    assert "optimizer.offload.fraction" in text
    assert "engine.zero_stage=1" in text
    assert "whole matrices" in refused(capsys, "optimizer=muon")
    assert "use more ranks" in refused(capsys, "--device-memory", "8")
    assert "host_bytes" in refused(capsys, "optimizer.offload.host_memory_gib=1")


def test_the_page_shows_places_memory_and_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAT, "--subgroups"]) == 0
    page = capsys.readouterr().out
    assert "stated, not measured" in page
    assert "predicted from these rates, not measured" in page
    places = next(line for line in page.splitlines() if line.startswith("places: ")).split()[1]
    assert set(places) <= set("SCR")
    lines = [line.split() for line in page.splitlines() if "100,000,000" in line and "subgroups" not in line]
    assert [line[0] for line in lines] == [str(number) for number in range(len(places))]


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from pretrain.cli import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *FLAT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_model_of_a_configuration_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["offload", "plan", "model=mamba2_130m", "train.precision=bf16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 120e6 < found["parameters"] < 180e6
    assert found["elements"] == found["parameters"]


def test_the_kernel_verb_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["offload", "kernel", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["level"] == kernel_level()
    assert (code == 0) == (answer["level"] in LEVELS) == (answer["library"] is not None)


def test_the_kernel_verb_says_why_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["offload", "kernel"]) == 1
    text = capsys.readouterr()
    assert "no-such-compiler" in text.err
    assert "torch" in text.out


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1.5", "many"])
def test_counts_are_whole_and_positive(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit):
        main(["offload", "plan", f"--parameters={text}"])
    assert "expected a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("/nonexistentdir",), "/nonexistentdir: no such folder"),
        (("optimizr.offload.fraction=0.1",), "optimizr"),
        (("nosuch=1",), "nosuch"),
        (("data.x=[1",), "grammar"),
        (("optimizer.offload.subgroup_size=1000",), "raise subgroup_size"),
        (("optimizer.offload.cpu_threads=1000000",), "optimizer.offload.cpu_threads"),
        (("--constants", ""), "--constants ''"),
    ],
)
def test_mistakes_are_not_passed_over(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert main(["offload", "plan", *arguments, "--parameters", "1e9"]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("h2d", "1e-300"), ("link_with_cpu", "1.5"), ("link_with_cpu", "0"), ("d2h", "1" + 400 * "0")]
)
def test_rates_that_nothing_has_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, value: str
) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({**asdict(RATES), name: "HERE"}).replace('"HERE"', value))
    assert f"{name} is" in refused(capsys, "--constants", str(file))


def test_a_file_nested_too_deeply_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text("[" * 100_000)
    assert "is no JSON" in refused(capsys, "--constants", str(file))


@pytest.mark.parametrize("option", ["--device-memory", "--tokens", "--activations", "--tflops"])
def test_sizes_that_nothing_has_are_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*FLAT, option, "1e300"])
    assert caught.value.code == 2
    assert option in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.optim.offload.probe.probe", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "rates.json"):
        assert main(["offload", "probe", "--device", "cpu", "--save", str(place)]) == 2
        assert f"--save {place}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["offload", "probe", "--threads", "1000000"])
    assert "threads on this machine" in capsys.readouterr().err
