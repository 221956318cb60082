"""The batch script: what is rendered, what a site's own template may do, and how its faults are told."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm.script import Template, TemplateError, render, shipped_template
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.config.schema import Config

LAUNCHER = SlurmConfig(num_processes=8, num_nodes=2, time_limit="02:00:00", threads_per_process=3)


def rendered(
    cluster: ClusterConfig | None = None, launcher: SlurmConfig = LAUNCHER, text: str | None = None, **more: Any
) -> str:
    config = Config(launcher=launcher, cluster=cluster or ClusterConfig())
    template = Template.read(config) if text is None else Template(text, Path("/site/own.j2"))
    return render(config, Path("/runs/demo-1"), template, signal_lead_s=90, working_dir=Path("/home/me"), **more)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_shipped_template_asks_for_what_the_configuration_says() -> None:
    cluster = ClusterConfig(
        account="lab", partition="gpu", gres="gpu:{processes_per_node}", memory_per_node="0", exclude=["n7"]
    )
    assert directives(rendered(cluster, exclude=["n3"])) == [
        "--job-name=demo-1",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=3",
        "--time=02:00:00",
        "--output=/runs/demo-1/slurm/job_%j.log",
        "--open-mode=append",
        "--chdir=/home/me",
        "--signal=B:USR1@90",
        "--requeue",
        "--account=lab",
        "--partition=gpu",
        "--gres=gpu:4",
        "--mem=0",
        "--exclude=n3,n7",
    ]


def test_elastic_run_and_site_without_requeue() -> None:
    script = rendered(launcher=replace(LAUNCHER, min_nodes=1, requeue_by="submit", threads_per_process=None))
    assert "--nodes=1-2" in directives(script)
    assert "--no-requeue" in directives(script)
    assert "--no-kill" in directives(script)
    assert "cpus-per-task" not in script


def test_script_runs_in_bash_with_modules_setup_and_awkward_values(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        modules=["cuda/12.4"],
        setup=["greeting=hello", 'printf "%s\\n" "$greeting" >> "$OUT"'],
        environment={"NOTE": 'it\'s $HOME and "more"', "FLAG": True, "LEVEL": 3},
        network_interface="ib0",
        python=str(tmp_path / "python with blank"),
    )
    fake = tmp_path / "python with blank"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$NOTE" "$FLAG" "$LEVEL" "$NCCL_SOCKET_IFNAME" >> "$OUT"\n')
    fake.chmod(0o755)
    # `module` is a shell function of the site.
    program = 'module() { echo "module $*" >> "$OUT"; }\n' + rendered(cluster)
    out = tmp_path / "out"
    subprocess.run(["bash", "-c", program], check=True, env={"OUT": str(out), "PATH": "/usr/bin:/bin"})
    assert out.read_text().splitlines() == [
        "module load cuda/12.4",
        "hello",
        "-m",
        "launchers.slurm.job",
        "/runs/demo-1",
        'it\'s $HOME and "more"',
        "true",
        "3",
        "ib0",
    ]


def test_line_of_the_site_that_fails_is_named() -> None:
    script = rendered(ClusterConfig(setup=["true", "cd /no/such/folder"]))
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "of the batch script failed" in result.stderr
    assert "cd /no/such/folder" in result.stderr


GOOD_END = "\nexec python -m launchers.slurm.job {{ run_dir }}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#!/bin/bash\n#SBATCH -t {{ time_limit\n", r"/site/own\.j2, line 2: .*\n  2 \| #SBATCH -t \{\{ time_limit"),
        ("#!/bin/bash\n\n{% if gres %}\n", r"own\.j2, line 3: .*end"),
        (
            "#!/bin/bash\n#SBATCH -A {{ acount }}\n" + GOOD_END,
            r"own\.j2, line 2: 'acount' is undefined \(there are: .*cluster",
        ),
        ("#!/bin/bash\n\n# {{ cluster.acount }}\n" + GOOD_END, r"own\.j2, line 3: .*acount"),
        ("#!/bin/bash\n# {{ 1 / 0 }}\n" + GOOD_END, r"own\.j2, line 2: division by zero"),
        ("#!/bin/bash\n# {{ run_dir | shout }}\n" + GOOD_END, r"own\.j2, line 2: No filter named 'shout'"),
        ("#SBATCH -N2\n" + GOOD_END, r"line 1: the first line must name the shell"),
        (
            "#!/bin/bash\ncd /tmp\n#SBATCH -N2\n" + GOOD_END,
            r"line 3: an #SBATCH line after the first command \(line 2\)",
        ),
        ("#!/bin/bash\nsrun hostname\n", r"never starts `python -m launchers.slurm.job"),
        ("#!/bin/bash\npython -m launchers.slurm.job {{ run_dir }}\n", r"must be started with `exec`"),
        ("#!/bin/bash\nif true; then\n" + GOOD_END, r"line \d: syntax error"),
    ],
)
def test_fault_of_a_template_is_told_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(TemplateError, match=expected) as caught:
        rendered(text=text)
    assert "/site/own.j2" in str(caught.value)
    assert "Nothing was submitted" in str(caught.value)


def test_start_of_the_supervisor_may_take_two_lines() -> None:
    script = rendered(text="#!/bin/bash\nexec numactl --all \\\n  python -m launchers.slurm.job {{ run_dir }}\n")
    assert "numactl" in script


def test_all_faults_of_a_rendered_script_are_told_together() -> None:
    with pytest.raises(TemplateError) as caught:
        rendered(text="echo hi\n#SBATCH -N2\n")
    assert len(re.findall(r"\n  line \d+:", str(caught.value))) == 3


def test_copied_template_may_add_what_a_site_needs() -> None:
    text = (
        shipped_template()
        .read_text()
        .replace("#SBATCH --open-mode=append", "#SBATCH --open-mode=append\n#SBATCH --comment={{ cluster.name }}")
    )
    assert "--comment=alps" in directives(rendered(ClusterConfig(name="alps"), text=text))


@pytest.mark.parametrize("path", ["/runs/my run", "/runs/50%", "/runs/a#b"])
def test_paths_that_directives_cannot_hold_are_refused(path: str) -> None:
    config = Config(launcher=LAUNCHER)
    with pytest.raises(TemplateError, match="choose another folder"):
        render(config, Path(path), Template.read(config), signal_lead_s=1, working_dir=Path("/"))


def test_missing_template_is_named() -> None:
    config = Config(launcher=replace(LAUNCHER, template="/site/gone.j2"))
    with pytest.raises(TemplateError, match=r"launcher.template: /site/gone.j2 cannot be read \(No such file"):
        Template.read(config)
