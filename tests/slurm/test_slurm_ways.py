"""Runs on a real Slurm whose data are damaged, whose MLflow server dies, and whose site wants other ways."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from support import damaged_text
from support.command import Outcome, pretrain
from support.damaged_text import damage, prepare_blocks
from support.faults import fault, faulty
from support.mlflow_server import server
from support.slurm_cluster import SlurmCluster, wait_until
from support.slurm_run import SlurmRun
from support.tcp_proxy import free_port

from pretrain.tracking.store import import_client

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def local_losses(path: Path, *overrides: str) -> dict[int, float]:
    """Of the same run without Slurm."""
    settings = [each for each in overrides if not each.startswith("launcher.")]
    result = pretrain("run", "--run-dir", path, *settings, "launcher.num_processes=2", cwd=path.parent)
    assert result.returncode == 0, result.stderr
    return Outcome(path).losses()


def test_a_damaged_shard_stops_the_run_and_may_then_be_substituted(slurm: SlurmCluster, tmp_path: Path) -> None:
    folder = prepare_blocks(tmp_path / "json")
    sound = Path(shutil.copytree(folder, tmp_path / "sound"))
    member = damage(folder)
    overrides = [*damaged_text.OVERRIDES, "launcher.node_check=false"]
    run = SlurmRun(slurm, tmp_path / "run", *overrides, f"data.path={folder}")
    assert run.wait() == [("data_fault", "stop")]
    assert member in run.events("attempt_ended")[0]["reason"]
    before = run.outcome.losses()
    assert 2 <= len(before) < 8
    undisturbed = local_losses(tmp_path / "undisturbed", *overrides, f"data.path={sound}")
    assert before == {step: undisturbed[step] for step in before}

    again = slurm.pretrain("resume", run.path, "data.on_damage=substitute", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    wait_until(lambda: run.ends()[-1] == ("finished", "stop"), "the resumed run", 120)
    straight = local_losses(tmp_path / "straight", *overrides, f"data.path={folder}", "data.on_damage=substitute")
    assert run.outcome.losses() == straight


def test_agents_on_the_nodes_and_a_new_job_for_every_life(
    slurm: SlurmCluster, tiny: list[str], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """What sites that forbid requeueing, want torch's own launcher, or have the software in an image, choose."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$IMAGE $*" >> {tmp_path}/calls\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    faults = [fault("kill", 4, rank=1, once=tmp_path / "kill"), fault("host_memory", 6, rank=0, once=tmp_path / "oom")]
    run = SlurmRun(
        slurm,
        tmp_path / "run",
        *tiny,
        *faulty(*faults),
        "launcher.start=torchrun",
        "launcher.requeue_by=submit",
        "launcher.node_check=true",
        'cluster.container="env IMAGE=box"',
        f"cluster.container_python={python}",
    )
    assert run.wait() == [("killed", "restart"), ("host_memory", "requeue"), ("finished", "stop")]
    submitted = run.events("submitted")
    assert [entry["kind"] for entry in submitted] == ["first", "chain"]
    assert [entry["job"] for entry in run.events("attempt_started")] == [submitted[i]["job"] for i in (0, 0, 1)]
    calls = (tmp_path / "calls").read_text()
    assert all(f"box -m {module}" in calls for module in ("launchers.slurm.node_task", "torch.distributed.run"))
    assert "launchers.slurm.job" not in calls
    assert run.outcome.losses() == undisturbed


def ids_by_name(uri: str, experiment: str, count: int) -> dict[str, str] | None:
    """MLflow's ids of the ``count`` runs of the experiment; None as long as there are fewer."""
    client = import_client(uri)
    known = client.get_experiment_by_name(experiment)
    runs = client.search_runs([known.experiment_id]) if known is not None else []
    assert len(runs) <= count
    return {run.info.run_name: run.info.run_id for run in runs} if len(runs) == count else None


def test_an_mlflow_server_that_dies_under_two_runs(slurm: SlurmCluster, tiny: list[str], tmp_path: Path) -> None:
    store, port = tmp_path / "server", free_port()
    store.mkdir()
    gates = {step: tmp_path / f"gate{step}" for step in (3, 7)}
    faults = [fault("hold", step, until=gate) for step, gate in gates.items()]
    uri = f"http://127.0.0.1:{port}"
    tracked = ["tracking=mlflow", f"tracking.uri={uri}", "tracking.flush_interval_s=0.5", "tracking.experiment=shared"]
    with server(store, port):
        runs = [
            SlurmRun(
                slurm, tmp_path / name, *tiny, *tracked, "launcher.node_check=false",
                *faulty(*faults, fault("kill", 5, rank=1, once=tmp_path / f"kill_{name}")),
            )
            for name in ("one", "two")
        ]  # fmt: skip
        for run in runs:
            run.wait_for_step(2)
        ids = wait_until(lambda: ids_by_name(uri, "shared", 2), "both runs at the server")
    # The server is dead: the runs go on, one of their ranks dies, and they come back.
    gates[3].touch()
    for run in runs:
        run.wait_for_step(6)
    with server(store, port):
        gates[7].touch()
        for run in runs:
            assert run.wait() == [("killed", "restart"), ("finished", "stop")]
        assert ids_by_name(uri, "shared", 2) == ids
        client = import_client(uri)
        for run in runs:
            run_id = ids[run.path.name]
            wait_until(lambda i=run_id: client.get_run(i).info.status == "FINISHED", "the status to arrive", 30)
            values = {m.step: m.value for m in client.get_metric_history(run_id, "train/loss")}
            assert values == pytest.approx(run.outcome.losses())
            assert client.get_run(run_id).data.metrics["lifecycle/restarts"] == 1
