"""``pretrain model describe``: what it prints against the cost of the model."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from pretrain.cli import main
from pretrain.commands.model import LENGTHS, count, flops, grouped, size
from pretrain.config.components import check_component
from pretrain.config.compose import compose
from pretrain.config.typecheck import Report
from pretrain.models.hybrid.cost import cost_by_part, model_cost


def described(capsys, *words):
    assert main(["model", "describe", *words]) == 0
    return capsys.readouterr().out


def model(*overrides):
    return check_component(compose(overrides)["model"], "model", Report())


@pytest.mark.parametrize("name", ["hybrid_tiny", "mamba2_hybrid_8b"])
@pytest.mark.parametrize(("precision", "width"), [("bf16", 2), ("fp32", 4)])
def test_json_holds_the_numbers_of_the_cost(name, precision, width, capsys):
    found = json.loads(described(capsys, f"model={name}", "--json", "--precision", precision, "--train-length", "2048"))
    config = model(f"model={name}")
    total = model_cost(config, 2048, width)
    assert found["total"] == {
        "parameters": total.parameters,
        "active_parameters": total.active_parameters,
        "forward_flops_per_token": total.flops_per_token,
        "training_flops_per_token": 3 * total.flops_per_token,
        "activation_bytes_per_token": total.activation_bytes_per_token,
    }
    parts = cost_by_part(config, 2048, width)
    assert {part["part"]: part["parameters"] for part in found["parts"]} == {
        part: cost.parameters for part, cost in parts.items()
    }
    assert [row["length"] for row in found["lengths"]] == LENGTHS == [512 * 2**i for i in range(9)]
    for row in found["lengths"]:
        cost = model_cost(config, row["length"], width)
        assert row["generation_bytes"] == cost.state_bytes
        assert row["activation_bytes_per_token"] == cost.activation_bytes_per_token
        assert row["training_flops_per_token"] == 3 * cost.flops_per_token
        keys_and_values = 2 * config.attention.kv_heads * config.attention.features(config.width) * row["length"]
        assert row["kv_cache_bytes"] == config.layer_pattern.count("*") * keys_and_values * width
        assert row["recurrent_state_bytes"] == found["lengths"][0]["recurrent_state_bytes"] > 0
        assert row["generation_bytes"] == row["kv_cache_bytes"] + row["recurrent_state_bytes"]


def test_text_holds_the_same_numbers(capsys):
    text = described(capsys, "--length", "1024", "65536", "model=mamba2_hybrid_8b")
    config = model("model=mamba2_hybrid_8b")
    lines = text.splitlines()
    assert "8,654,517,248" in text
    assert f"Layers, first to last: {config.layer_pattern}" in lines
    parts = cost_by_part(config, 4096)
    for name, layers in (("Mamba-2", 24), ("attention", 4), ("MLP", 28)):
        row = next(line.split("  ") for line in lines if line.startswith(f"  {name} x {layers}"))
        cells = [cell.strip() for cell in row if cell.strip()]
        assert cells[1] == f"{parts[name].parameters:,}"
        assert cells[4:7] == [
            flops(parts[name].flops_per_token),
            flops(3 * parts[name].flops_per_token),
            size(parts[name].activation_bytes_per_token),
        ]
    for length in (1024, 65536):
        row = next(line for line in lines if line.startswith(f"  {length:,}"))
        assert row.endswith(size(model_cost(config, length).state_bytes))
    assert not any(line.startswith("  512 ") for line in lines)


def test_a_terminal_gets_the_same_cells(capsys, monkeypatch):
    words = ["model=hybrid_tiny", "--length", "512"]
    plain = described(capsys, *words)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    coloured = described(capsys, *words)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == plain.split()


def test_overrides_change_what_is_described(capsys):
    found = json.loads(
        described(
            capsys,
            "model=mamba2_hybrid_8b",
            "--json",
            "model.layer_ratios.num_layers=24",
            "model.layer_ratios.shares={mamba2: 0.5, attention: 0, mlp: 0.5}",
        )
    )
    assert found["pattern"] == "M-" * 12
    assert [kind["layers"] for kind in found["layers"]] == [12, 12]
    assert all(row["kv_cache_bytes"] == 0 for row in found["lengths"])


def test_a_run_directory_is_described_by_its_frozen_configuration(tmp_path, capsys):
    tree = compose(["model=hybrid_tiny", "model.vocab_size=512"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    found = json.loads(described(capsys, str(tmp_path), "--json"))
    assert found["vocab_size"] == 512
    assert found["total"]["parameters"] == model_cost(model("model=hybrid_tiny", "model.vocab_size=512"), 64).parameters


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=hybrid_tiny", "model.pattern=M?", "model.width=-1"], ["model.pattern", "model.width"]),
        (["model=hybrid_tiny", "model.layer_ratios={num_layers: 8, shares: {mamba2: 0.9}}"], ["shares", "pattern"]),
        (["model=nothing_of_the_kind"], ["nothing_of_the_kind"]),
        (["model._target_=collections.Counter"], ["collections.Counter", "HybridConfig"]),
    ],
)
def test_faults_are_told_together(words, expected, capsys):
    assert main(["model", "describe", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(text in captured.err for text in expected)


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["model", "describe", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_lengths_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        main(["model", "describe", "model=hybrid_tiny", "--length", "0"])
    assert "--length" in capsys.readouterr().err


def test_describing_does_not_import_torch():
    code = (
        "import sys; from pretrain.cli import main; "
        "assert main(['model', 'describe', 'model=mamba2_hybrid_8b']) == 0; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_repeated_pieces_are_grouped_only_where_that_is_shorter():
    assert grouped("M-" * 24) == "(M-)x24"
    assert grouped("M" * 48) == "(M)x48"
    assert grouped("M-M*-") == "M-M*-"
    assert grouped("M-M-M-M*" * 8 + "M-") == "(M-M-M-M*)x8 M-"


def test_figures_have_units():
    assert [count(999), count(1_234_567), count(8_654_517_248)] == ["999", "1.23 M", "8.65 B"]
    assert [flops(46.9e9), flops(2e12)] == ["46.9 GFLOP", "2.00 TFLOP"]
    assert [size(0), size(1536), size(6 * 2**30), size(3.5 * 2**60)] == ["0 B", "1.50 KiB", "6.00 GiB", "3,584 PiB"]
