"""The template of the batch script: read where a run is submitted, and needed by nobody afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from support.small_text import small_run

from launchers.run_dir import RunDir
from launchers.slurm import elastic
from launchers.slurm.commands import Slurm
from launchers.slurm.script import TemplateError, shipped_template
from launchers.slurm.submit import prepare, submit, template_copy
from pretrain.config.compose import compose_leniently
from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.schema import Config
from pretrain.planning.preflight.cluster import check
from pretrain.planning.preflight.subject import Subject


class Queue:
    """A Slurm that takes every job and knows none."""

    def submit(self, script: Path) -> int:
        return 7

    def job(self, job: int) -> None:
        return None


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.j2"
    path.write_text(shipped_template().read_text().replace("#!/bin/bash", "#!/bin/bash\n# of the site"))
    return path


@pytest.fixture
def config(own: Path) -> Config:
    return Config(launcher=SlurmConfig(num_processes=2, num_nodes=2, min_nodes=1, template=str(own)))


@pytest.fixture
def submitted(config: Config, own: Path, tmp_path: Path) -> RunDir:
    run = RunDir.create({"launcher": vars(config.launcher), "train": {"steps": 1}}, path=tmp_path / "run")
    submit(run, config, "first", working_dir=tmp_path, slurm=cast(Slurm, Queue()))
    return run


def test_run_whose_template_is_gone_continues_with_its_own_copy(
    config: Config, own: Path, submitted: RunDir, tmp_path: Path
) -> None:
    own.unlink()
    for kind in ("resume", "chain"):
        script = prepare(config, submitted.path, kind=cast(Any, kind), working_dir=tmp_path)
        assert script.template.path == template_copy(submitted.path)
        assert "# of the site" in script.text
    submit(submitted, config, "resume", working_dir=tmp_path, slurm=cast(Slurm, Queue()))
    assert "# of the site" in (submitted.path / "slurm" / "job_0002.sbatch").read_text()


def test_template_that_changed_counts_for_a_resume(
    config: Config, own: Path, submitted: RunDir, tmp_path: Path
) -> None:
    own.write_text(own.read_text().replace("# of the site", "# of the site, newer"))
    assert "newer" in prepare(config, submitted.path, kind="resume", working_dir=tmp_path).text
    assert "newer" not in prepare(config, submitted.path, kind="chain", working_dir=tmp_path).text


def test_wrong_path_is_not_met_by_the_old_copy(config: Config, submitted: RunDir, tmp_path: Path) -> None:
    wrong = replace(config, launcher=replace(cast(SlurmConfig, config.launcher), template=str(tmp_path / "typo.j2")))
    with pytest.raises(TemplateError, match=r"typo\.j2 cannot be read"):
        prepare(wrong, submitted.path, kind="resume", working_dir=tmp_path)
    (found,) = [f for f in check(Subject({}, wrong, submitted)) if f.what == "launcher.template"]
    assert found.level == "error"


def test_nodes_do_not_need_the_template(data_path: Path) -> None:
    # The whole check of a configuration, as the supervisor makes it for the layout of an attempt.
    launcher = ["launcher=slurm", "launcher.num_processes=2", "launcher.template=/login/node/own.j2"]
    tree = compose_leniently([*small_run(data_path), *launcher]).tree
    layout = elastic.Layout(1, 2)
    assert elastic.fit(tree, layout, None, 1) == layout
