"""lm-evaluation-harness through the adapter, on tasks made here, against likelihoods from the model's own logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hybrid import hybrid

from data_pipeline.prepare.tokenizer import train_byte_level_bpe
from pretrain.commands.eval import figures
from pretrain.evaluation.harness import HarnessLM, run_tasks
from pretrain.parallel.layers import TorchLayers

CORPUS = ["The quick brown fox jumps over the lazy dog. " * 3, "pack my box with five dozen liquor jugs\n" * 3]
CHOICES = [
    {"question": "The quick brown", "choices": [" fox", " dog", " liquor jugs"], "answer": 0},
    {"question": "pack my box with", "choices": [" five dozen", " lazy"], "answer": 1},
    {"question": "", "choices": ["The quick", "jugs"], "answer": 0},
]
TEXTS = [{"text": "The quick brown fox jumps over the lazy dog. " * 4}, {"text": "My box with jugs!"}]
PROMPTS = [{"prompt": "The quick", "answer": " brown"}, {"prompt": "pack my box", "answer": " with"}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> HarnessLM:
    file = train_byte_level_bpe(CORPUS, 300)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(file.text)
    config = hybrid(
        "M*-", 32, file.vocab_size, attention__num_heads=4, mamba2__head_dim=16, mamba2__state_dim=8, init_std=0.2
    )
    model = config.build(TorchLayers())
    model.reset_parameters(0)
    return HarnessLM(model.eval(), path, batch_size=2, max_length=24)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(
        folder,
        "own_choices",
        CHOICES,
        "multiple_choice",
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\ntarget_delimiter: ''\n",
        ["acc"],
    )
    write_task(
        folder,
        "own_text",
        TEXTS,
        "loglikelihood_rolling",
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\n",
        ["word_perplexity", "bits_per_byte"],
    )
    write_task(
        folder,
        "own_answers",
        PROMPTS,
        "generate_until",
        "doc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['o', 'zzz'], max_gen_toks: 6, do_sample: false}\n",
        ["exact_match"],
    )
    return folder


def write_task(folder: Path, name: str, documents: list[Any], kind: str, body: str, metrics: list[str]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    head = (
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        f"output_type: {kind}\n"
    )
    rows = "".join(f"  - metric: {metric}\n" for metric in metrics)
    (folder / f"{name}.yaml").write_text(head + body + "metric_list:\n" + rows)


def log_probability(adapter: HarnessLM, tokens: list[int], first: int) -> float:
    """Of ``tokens[first:]`` after what stands before them, from one unpadded forward pass in float64."""
    with torch.no_grad():
        logits = adapter._model(torch.tensor(tokens).unsqueeze(1)).squeeze(1).double().log_softmax(-1)
    return sum(float(logits[place - 1, tokens[place]]) for place in range(first, len(tokens)))


def values(record: dict[str, Any]) -> dict[str, float]:
    return {f"{task}/{metric}": value for task, metric, _, value, _ in figures(record)}


def test_tasks_are_scored_as_from_the_logits(
    adapter: HarnessLM, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    found = values(run_tasks(adapter, ["own_choices", "own_text", "own_answers"], [tasks], None))

    right = 0
    for document in CHOICES:
        context = adapter.tok_encode(document["question"])  # the token that begins documents, at least
        scores = []
        for choice in document["choices"]:
            whole = adapter.tok_encode(document["question"] + choice)
            scores.append(log_probability(adapter, whole, len(context)))
        right += scores.index(max(scores)) == document["answer"]
    assert found["own_choices/acc"] == pytest.approx(right / len(CHOICES))

    nats = num_bytes = words = 0.0
    for document in TEXTS:
        tokens = adapter.tok_encode(document["text"])
        # Windows of 24 inputs: the first predicts 24 tokens, each further one as many, the last from a full context.
        done = 1
        while done < len(tokens):
            end = min(len(tokens), done + adapter.max_length)
            begin = max(0, end - adapter.max_length - 1)
            nats -= log_probability(adapter, tokens[begin:end], done - begin)
            done = end
        num_bytes += len(document["text"].encode())
        words += len(document["text"].split())
        assert len(tokens) > 1
    assert found["own_text/bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    assert "own_answers/exact_match" in found


def test_generated_answers_stop_where_the_task_says(adapter: HarnessLM) -> None:
    class Request:
        def __init__(self, *args: Any) -> None:
            self.args = args

    free, cut = (
        adapter.generate_until([Request("The quick", {"until": until, "max_gen_toks": 8})])[0] for until in ([], ["z"])
    )
    assert free
    stop = free[2]
    assert adapter.generate_until([Request("The quick", {"until": [stop], "max_gen_toks": 8})]) == [
        free[: free.index(stop)]
    ]
    assert cut == free.split("z")[0]
    with pytest.raises(ValueError, match="num_beams are not offered"):
        adapter.generate_until([Request("a", {"num_beams": 4})])
    with pytest.raises(ValueError, match="generates 30 tokens, but the model reads 24"):
        adapter.generate_until([Request("a", {"max_gen_toks": 30})])


def test_tasks_that_sample_do_so_at_temperature_one_unless_they_name_another(adapter: HarnessLM) -> None:
    class Request:
        def __init__(self, *args: Any) -> None:
            self.args = args

    def texts(**settings: Any) -> list[str]:
        requests = [Request("The quick", {"max_gen_toks": 8, "until": [], **settings}) for _ in range(3)]
        return adapter.generate_until(requests)

    greedy = texts()
    assert greedy == texts(do_sample=False) == texts(do_sample=True, temperature=0.0)
    sampled = texts(do_sample=True)
    assert len({*sampled, *greedy}) == 4  # each request draws for itself
    assert sampled == texts(do_sample=True, temperature=None) == texts(do_sample=True, temperature=1.0)
    assert sampled != texts(do_sample=True, temperature=1e-3)


def test_likelihoods_of_pairs(adapter: HarnessLM) -> None:
    class Request:
        def __init__(self, *args: Any) -> None:
            self.args = args

    assert adapter.loglikelihood([Request("", "")], disable_tqdm=True) == [(0.0, True)]
    pairs = [("The quick", " brown fox"), ("", "pack my"), ("", ""), ("pack my box with ", "five")]
    found = adapter.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        # Spaces at the end of a context belong to the continuation, as everywhere in the harness.
        whole = adapter.tok_encode(context + continuation)
        first = len(adapter.tok_encode(context.rstrip()))
        assert score == pytest.approx(log_probability(adapter, whole, first), abs=1e-4)


def test_tasks_that_are_not_there_are_named(adapter: HarnessLM, tasks: Path) -> None:
    with pytest.raises(ValueError, match=r"no task hellaswag in .*; there are: own_answers, own_choices, own_text"):
        run_tasks(adapter, ["own_text", "hellaswag"], [tasks], None)
