"""The report on this machine: complete, never raising, and honest about what blocks training."""

from __future__ import annotations

import argparse
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pretrain import doctor


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[doctor.Finding]:
    return doctor.report(tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("runs"))


def _get(findings: list[doctor.Finding], item: str) -> doctor.Finding:
    (found,) = [finding for finding in findings if finding.item == item]
    return found


def test_every_area_is_covered(findings: list[doctor.Finding]) -> None:
    items = {finding.item for finding in findings}
    assert {
        "Python",
        "CPU cores",
        "memory",
        "torch",
        "gloo",
        "NCCL",
        "deepspeed",
        "megatron-core",
        "CPU adaptation",
    } <= items
    assert {"mamba-ssm", "causal-conv1d", "flash-attn", "flash-linear-attention"} <= items
    assert {"sbatch", "srun", "scontrol", "MLflow store", "disk", "/dev/shm"} <= items
    assert "probe" not in items  # no probe failed
    assert all(finding.detail and finding.needed_for for finding in findings)


def test_here_training_can_run_and_versions_are_the_installed_ones(findings: list[doctor.Finding]) -> None:
    import torch

    assert doctor.can_train(findings)
    assert torch.__version__ in _get(findings, "torch").detail


def test_a_missing_requirement_fails_the_verdict(findings: list[doctor.Finding]) -> None:
    missing = doctor.Finding("packages", "deepspeed", "missing", "not installed", "the engine", required=True)
    optional = doctor.Finding("Slurm", "srun", "missing", "not on PATH", "clusters")
    assert doctor.can_train([*findings, optional])
    assert not doctor.can_train([*findings, missing])


@pytest.mark.parametrize(
    ("version", "has_cuda", "package", "on_cpu"),
    [
        ("0.16.1", False, ("ok", "0.16.1"), ("ok", "made for 0.16.1")),
        ("0.16.1", True, ("ok", "0.16.1"), ("ok", "not used")),
        ("0.99.0", False, ("warn", "0.99.0, which this release does not know"), ("missing", "0.16.1")),
        (None, False, ("missing", "not installed"), ("missing", "0.16.1")),
    ],
)
def test_megatrons_version_decides_whether_its_engine_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    has_cuda: bool,
    package: tuple[str, str],
    on_cpu: tuple[str, str],
) -> None:
    import torch

    monkeypatch.setattr(doctor, "_version", lambda name: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    found = list(doctor._megatron())
    assert [finding.item for finding in found] == ["megatron-core", "CPU adaptation"]
    for finding, (status, detail) in zip(found, (package, on_cpu), strict=True):
        assert finding.status == status
        assert detail in finding.detail
        assert not finding.required  # DeepSpeed trains without it


def test_back_ends_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pretrain.ops import backends

    def found() -> dict[str, tuple[str, str]]:
        backends._choose.cache_clear()
        return {finding.item: (finding.status, finding.detail) for finding in doctor._back_ends()}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    ways = ("ok", "sdpa, blocked")
    assert found() == {"state spaces": ("ok", "torch: there is no GPU here"), "attention": ways}
    monkeypatch.setenv(backends.VARIABLE, "mamba_ssm")
    status, detail = found()["state spaces"]
    assert status == "warn"
    assert "PRETRAIN_KERNELS=mamba_ssm, but there is no GPU" in detail

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_load", lambda adapter: (None, f"{adapter.distribution} is not installed"))
    status, detail = found()[backends.VARIABLE]
    assert status == "warn"
    assert "pip install mamba-ssm" in detail
    monkeypatch.setenv(backends.VARIABLE, "auto")
    assert found()["ssd"] == ("ok", "torch: mamba-ssm is not installed; flash-linear-attention is not installed")
    assert set(found()) == {*backends.KERNELS, "attention"}
    monkeypatch.setattr(backends, "_load", lambda adapter: (print, f"{adapter.distribution} 9"))
    assert found()["causal_conv"] == ("ok", "mamba_ssm: causal_conv1d_fn of causal-conv1d 9")
    backends._choose.cache_clear()


def test_the_report_imports_no_engine() -> None:
    code = (
        "import sys, pathlib, pretrain.doctor as d; d.report(pathlib.Path('.'));"
        "print([m for m in ('deepspeed', 'megatron.core') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_slurm_is_found_by_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in {"sbatch": "echo slurm 23.11.4", "srun": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {finding.item: finding for finding in doctor._slurm()}
    assert (found["sbatch"].status, found["sbatch"].detail) == ("ok", "slurm 23.11.4")
    assert found["srun"].status == "warn"
    assert found["scontrol"].status == "missing"


def test_a_remote_server_is_asked_for_its_health(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (alive,) = doctor._tracking(tmp_path)
    server.shutdown()
    server.server_close()
    (dead,) = doctor._tracking(tmp_path)
    assert (alive.status, dead.status) == ("ok", "warn")
    assert uri in dead.detail


def test_a_probe_that_breaks_becomes_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("driver exploded")

    broken.__name__ = "_torch"
    monkeypatch.setattr(doctor, "_torch", broken)
    assert "driver exploded" in " ".join(finding.detail for finding in doctor.report(tmp_path, tmp_path))


def test_json_and_table_and_exit_code(
    findings: list[doctor.Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    monkeypatch.setattr(doctor, "report", lambda store: findings)
    assert doctor.run(parser.parse_args(["--json"])) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["can_train"] is True
    assert len(parsed["findings"]) == len(findings)
    broken = [doctor.Finding("torch", "torch", "missing", "does not import", "training", required=True)]
    monkeypatch.setattr(doctor, "report", lambda store: broken)
    assert doctor.run(parser.parse_args([])) == 1
    assert "torch missing" in capsys.readouterr().out
