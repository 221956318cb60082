"""The command line: light start, verbs, overrides around options."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pretrain.cli import VERBS, main


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pretrain.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'numpy', 'hydra', 'mlflow', 'rich', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    for verb in VERBS:
        assert verb in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_describes_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: pretrain {verb}" in capsys.readouterr().out


def test_unknown_verbs_and_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "unknown verb 'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["config", "check", "experiment=demo", "--fast"])
    assert ended.value.code == 2


def test_overrides_may_stand_around_options(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    main(["config", "check", "train.steps=0", "--config-dir", str(tmp_path), "train.global_batch_size=7"])
    text = "".join(capsys.readouterr())
    assert "train.steps" in text
    assert "train.global_batch_size" in text
