"""A run on a mixture through the command line: validation by source, the report, and ``pretrain eval`` on it."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Outcome, pretrain
from torch.nn.functional import cross_entropy

from data_pipeline.config import TextDataConfig
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.text import prepare_text
from pretrain.checkpoint.reader import CheckpointReader, load_weights
from pretrain.cli import main
from pretrain.config.check import check
from pretrain.config.freeze import load
from pretrain.parallel.layers import TorchLayers
from pretrain.tracking.metrics_log import read_records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VOCABULARY = 300


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Program text, and prose with letters of several bytes; one tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    prose = folder / "raw"
    prose.mkdir()
    for number in range(40):
        (prose / f"{number}.txt").write_text(f"Größe {number}: naïve λ, 東京! " * (3 + number % 5), encoding="utf-8")
    code = Path(sysconfig.get_path("stdlib")) / "json"
    options = PrepareOptions(vocab_size=VOCABULARY, validation_fraction=0.2, block_tokens=1000)
    prepare_text(code, folder / "code", pattern="*.py", options=options, workers=1)
    same = PrepareOptions(tokenizer=str(folder / "code" / "tokenizer.json"), validation_fraction=0.2, block_tokens=500)
    prepare_text(prose, folder / "prose", options=same, workers=1)
    return {"code": folder / "code", "prose": folder / "prose"}


@pytest.fixture(scope="module")
def trained(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("run")
    listed = ", ".join(f"{name}: {path}" for name, path in sources.items())
    result = pretrain(
        "run", "--run-dir", folder / "run", "experiment=tiny", "data=mixture", "tracking=mlflow",
        f"data.sources={{{listed}}}", "data.weights={code: 1, prose: 1}", "data.sequence_length=32", "data.num_lanes=2",
        f"model.vocab_size={VOCABULARY}", "train.steps=2", "train.eval_interval=1", "train.eval_samples=5",
        "train.final_eval=true", "launcher.num_processes=2", "objective.accuracy=true",
        f"tracking.store={folder / 'mlruns'}",
        cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    assert "code:" in result.stdout
    return Outcome(folder / "run")


def model_of(run: Outcome) -> Any:
    tree = load((run.path / "config.yaml").read_text(), "config.yaml")
    model = check(tree).model.build(TorchLayers())
    load_weights(model, CheckpointReader(run.path / "checkpoints" / "step_00000002"))
    return model.eval()


@torch.no_grad()
def test_each_source_has_its_own_figures(trained: Outcome, sources: dict[str, Path]) -> None:
    records = [record for record in read_records(trained.path / "metrics.jsonl") if record["event"] == "eval"]
    final = records[-1]["metrics"]
    model, nats, targets, right = model_of(trained), 0.0, 0, 0
    for name, path in sources.items():
        validation = TextDataConfig(path=str(path), sequence_length=32).build(0).validation
        assert validation is not None
        batch = {key: torch.from_numpy(array) for key, array in validation.batch(range(validation.num_samples)).items()}  # type: ignore[arg-type]
        logits = model(batch["tokens"].t().long(), batch["seq_idx"].t(), batch["position_ids"].t()).transpose(0, 1)
        mask = batch["loss_mask"]
        chosen, wanted = logits[mask].double(), batch["targets"][mask].long()
        loss = float(cross_entropy(chosen, wanted, reduction="sum"))
        hits = int((chosen.argmax(-1) == wanted).sum())
        assert final[f"validation/{name}/loss"] == pytest.approx(loss / len(wanted), rel=1e-5)
        assert final[f"validation/{name}/perplexity"] == pytest.approx(math.exp(loss / len(wanted)), rel=1e-4)
        expected = loss / math.log(2) / validation.num_bytes  # type: ignore[operator]
        assert final[f"validation/{name}/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
        assert final[f"validation/{name}/accuracy"] == pytest.approx(hits / len(wanted), abs=2 / len(wanted))
        nats, targets, right = nats + loss, targets + len(wanted), right + hits
    assert final["validation_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert final["validation_accuracy"] == pytest.approx(right / targets, abs=2 / targets)
    # Of 5 samples spread over the split there is no byte count.
    assert "validation/code/loss" in records[0]["metrics"]
    assert not any("bits_per_byte" in name for name in records[0]["metrics"])
    # Training reports the same metric.
    training = [record for record in read_records(trained.path / "metrics.jsonl") if record["event"] == "train"]
    assert all("accuracy" in record["metrics"] for record in training)


def test_the_report_shows_each_source(trained: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained.path)]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    final = [r for r in read_records(trained.path / "metrics.jsonl") if r["event"] == "eval"][-1]["metrics"]
    for name in ("code", "prose"):
        figures = f"{final[f'validation/{name}/loss']:.3f} nats per token, perplexity"
        assert f"{name}: {figures}" in told
        assert f"{final[f'validation/{name}/bits_per_byte']:.3f} bits per byte" in told


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"text": "def f(x): return x\n"}) + "\n" + '{"text": "λ"}\n')
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    return folder


@torch.no_grad()
def test_harness_on_a_checkpoint(trained: Outcome, sources: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer

    out = tmp_path / "results.json"
    checkpoint = trained.path / "checkpoints" / "step_00000002"
    result = pretrain("eval", checkpoint, "--tasks", "own", "--include", tasks, "--out", out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    model, tokenizer = model_of(trained), Tokenizer.from_file(str(sources["code"] / "tokenizer.json"))
    nats = num_bytes = 0.0
    for text in ("def f(x): return x\n", "λ"):
        tokens = [tokenizer.token_to_id("<|bos|>"), *tokenizer.encode(text, add_special_tokens=False).ids]
        logits = model(torch.tensor(tokens).unsqueeze(1)).squeeze(1).double()
        nats += float(cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="sum"))
        num_bytes += len(text.encode())
    expected = nats / math.log(2) / num_bytes
    assert found["harness"]["results"]["own"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    assert found["step"] == 2
    assert f"{expected:.4f}" in result.stdout
    last = read_records(trained.path / "metrics.jsonl")[-1]
    assert (last["event"], last["step"]) == ("harness", 2)
    assert last["metrics"]["own/bits_per_byte"] == pytest.approx(expected, rel=1e-5)

    from mlflow.tracking import MlflowClient

    facts = json.loads((trained.path / "mlflow.json").read_text())
    run = MlflowClient(facts["uri"]).get_run(facts["run_id"])
    assert run.data.metrics["harness/own/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert run.data.metrics["eval/validation/prose/perplexity"] > 1
    assert run.info.status == "FINISHED"


def test_faults_are_told_together(trained: Outcome, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(trained.path), "--tasks", " , ", "--include", str(tasks / "none"), "--limit", "0"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "--tasks: names no task" in told
    assert "--limit: found 0, expected 1 or more" in told
    assert f"--include: {tasks / 'none'} is no folder" in told
    checkpoint = str(trained.path / "checkpoints" / "step_00000002")
    assert main(["eval", checkpoint, "--tasks", "own", "--include", str(tasks), "--checkpoint", "1"]) == 2
    assert "is a checkpoint already" in capsys.readouterr().err


def test_a_missing_harness_is_told_with_the_way_to_it(
    trained: Outcome, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(trained.path), "--tasks", "own", "--include", str(tasks)]) == 2
    assert "pip install 'pretrain[eval]'" in capsys.readouterr().err
