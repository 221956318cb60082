"""A run on a mixture through the command line: validation by source, the report, and ``pretrain eval`` on it."""

from __future__ import annotations

import json
import math
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Outcome, pretrain
from support.huggingface import their_logits, tiny
from torch.nn.functional import cross_entropy

from data_pipeline.config import TextDataConfig
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.text import prepare_text
from pretrain.checkpoint.reader import CheckpointReader, load_weights
from pretrain.cli import main
from pretrain.config.check import check
from pretrain.config.freeze import load
from pretrain.evaluation.subject import Subject, save_results
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


def bits_per_byte(logits_of: Callable[[torch.Tensor], torch.Tensor], sources: dict[str, Path]) -> float:
    """Of the texts of the task ``own``; ``logits_of`` takes tokens [L, 1] and gives [L, V]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(sources["code"] / "tokenizer.json"))
    nats = num_bytes = 0.0
    for text in ("def f(x): return x\n", "λ"):
        tokens = [tokenizer.token_to_id("<|bos|>"), *tokenizer.encode(text, add_special_tokens=False).ids]
        logits = logits_of(torch.tensor(tokens).unsqueeze(1)).double()
        nats += float(cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="sum"))
        num_bytes += len(text.encode())
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def test_harness_on_a_checkpoint(trained: Outcome, sources: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    checkpoint = trained.path / "checkpoints" / "step_00000002"
    result = pretrain("eval", checkpoint, "--tasks", "own", "--include", tasks, "--out", out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    model = model_of(trained)
    expected = bits_per_byte(lambda ids: model(ids).squeeze(1), sources)
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


def test_nothing_saved_is_overwritten(
    trained: Outcome, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_records(trained.path / "metrics.jsonl")
    command = ["eval", trained.path, "--tasks", "own", "--include", tasks]
    for further in ([], ["--limit", "1"]):
        result = pretrain(*command, *further, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    files = [trained.path / "artifacts" / f"eval_step_00000002_{number}.json" for number in (1, 2)]
    assert [json.loads(file.read_text())["limit"] for file in files] == [None, 1]
    added = read_records(trained.path / "metrics.jsonl")[len(before) :]
    assert [(record["event"], record["file"]) for record in added] == [("harness", str(file)) for file in files]

    saved = files[0].read_text()
    assert main([*map(str, command), "--out", str(files[0])]) == 2
    assert f"--out: {files[0]} is there already and is not overwritten; choose another name" in capsys.readouterr().err
    assert files[0].read_text() == saved


def test_a_file_that_comes_up_meanwhile_is_kept(tmp_path: Path) -> None:
    subject = Subject(tmp_path / "step_00000001", None, tmp_path)
    out = tmp_path / "figures.json"
    assert save_results(subject, out, "first") == out
    assert save_results(subject, out, "second") == tmp_path / "figures_1.json"
    assert out.read_text() == "first"


@torch.no_grad()
def test_harness_on_an_imported_folder(
    sources: dict[str, Path], tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tiny("llama", vocab_size=VOCABULARY)
    theirs.save_pretrained(tmp_path / "hf")
    shutil.copyfile(sources["code"] / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
    imported = tmp_path / "imported"
    assert pretrain("import", tmp_path / "hf", imported).returncode == 0
    # The folder, and the checkpoint in it.
    for number, source in enumerate((imported, imported / "checkpoint"), start=1):
        result = pretrain("eval", source, "--tasks", "own", "--include", tasks, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        found = json.loads((imported / f"eval_checkpoint_{number}.json").read_text())
        expected = bits_per_byte(lambda ids: their_logits(theirs, ids.t())[0], sources)
        assert found["harness"]["results"]["own"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    command = ["eval", str(imported), "--tasks", "own", "--include", str(tasks)]
    assert main([*command, "--checkpoint", "1"]) == 2
    assert "is a checkpoint already" in capsys.readouterr().err
    (imported / "tokenizer.json").unlink()
    assert main(command) == 2
    assert f"{imported} has no tokenizer.json, which the harness needs; name one" in capsys.readouterr().err


def test_a_checkpoint_without_its_run_is_told(
    trained: Outcome, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "copied"
    shutil.copytree(trained.path / "checkpoints" / "step_00000002", alone)
    assert main(["eval", str(alone), "--tasks", "own", "--include", str(tasks)]) == 2
    assert f"{alone}: a checkpoint outside its run directory" in capsys.readouterr().err


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
