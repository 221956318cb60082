"""Rules of the hybrid configuration, and its cost against the real module."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.cost_case import cache_bytes, measured_saves
from support.hybrid import changed, hybrid
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.components import check_component, with_renamed_fields
from pretrain.config.typecheck import Report
from pretrain.models.hybrid.cost import cost_by_part, layer_cost, model_cost
from pretrain.models.hybrid.pattern import LayerRatios
from pretrain.nn.cost import Cost
from pretrain.objectives.cross_entropy import cross_entropy_rows
from pretrain.parallel.layers import TorchLayers

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
SMALL = hybrid(
    pattern="M-*-",
    width=32,
    vocab_size=50,
    attention__num_heads=4,
    attention__num_kv_heads=2,
    mamba2__head_dim=16,
    mamba2__state_dim=8,
)


def faults(**changes):
    return {field: (found, rule, fix) for field, found, rule, fix in changed(SMALL, changes).violations()}


def test_a_good_configuration_has_no_violations():
    assert faults() == {}


@pytest.mark.parametrize(
    ("changes", "field", "rule", "fix"),
    [
        ({"pattern": ""}, "pattern", "one symbol for each layer", "M-M*-M-M-"),
        ({"pattern": None}, "pattern", "one symbol for each layer", "M-M*-M-M-"),
        ({"pattern": "MX*?"}, "pattern", "'M' Mamba-2", "'M*'"),
        ({"attention.num_heads": 5, "attention.num_kv_heads": 5}, "attention.num_heads", "divide width (32)", "4 or 8"),
        ({"attention.num_kv_heads": 3}, "attention.num_kv_heads", "divide num_heads (4)", "2 or 4"),
        ({"attention.num_kv_heads": 9}, "attention.num_kv_heads", "divide num_heads (4)", "4"),
        ({"attention.head_dim": 7, "attention.rope_theta": 1e4}, "attention.head_dim", "even", "8"),
        ({"mamba2.head_dim": 24}, "mamba2.head_dim", "expand * width (64)", "16 or 32"),
        ({"mamba2.groups": 3}, "mamba2.groups", "number of Mamba-2 heads (4", "2 or 4"),
        ({"mamba2.num_heads": 0}, "mamba2.num_heads", "positive", "8"),
        ({"vocab_size": 0}, "vocab_size", "positive", "32768"),
        ({"mamba2.chunk_size": -1}, "mamba2.chunk_size", "positive", "128"),
        ({"mlp.hidden_size": 0}, "mlp.hidden_size", "positive", "2048"),
        ({"max_sequence_length": 0}, "max_sequence_length", "positive", "4096"),
    ],
)
def test_each_rule_names_field_value_and_fix(changes, field, rule, fix):
    found = faults(**changes)
    assert list(found) == [field]
    assert found[field][0] == changes[field]
    assert rule in found[field][1]
    assert fix in found[field][2]


def test_all_faults_are_reported_together_and_refused_by_build():
    changes = {"pattern": "M*-Z", "attention.num_kv_heads": 3, "mamba2.groups": 3, "init_std": -1.0}
    assert set(faults(**changes)) == {"pattern", "attention.num_kv_heads", "mamba2.groups", "init_std"}
    with pytest.raises(ValueError, match=r"(?s)pattern = 'M\*-Z'.*init_std.*groups.*num_kv_heads"):
        changed(SMALL, changes).build(TorchLayers())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention.softcap", math.inf),
        ("attention.clip_gamma", math.nan),
        ("attention.clip_zeta", math.nan),
        ("logit_softcap", math.inf),
        ("norm.eps", math.inf),
        ("init_std", math.nan),
        ("moe.routed_scale", math.inf),
        ("moe.balance_loss", math.inf),
    ],
)
def test_numbers_that_would_make_every_logit_nan_are_refused(field, value):
    assert list(faults(**{"pattern": "M*E", field: value})) == [field]


@pytest.mark.parametrize(("pattern", "field"), [("-", "mlp.ratio"), ("E", "moe.ratio")])
def test_a_layer_without_hidden_features_is_refused(pattern, field):
    found = faults(**{"pattern": pattern, field: 0.001})
    assert "at least one hidden feature at width 32" in found[field][1]


FLAT = {
    "pattern": "M-*-",
    "width": 32,
    "vocab_size": 50,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mamba_head_dim": 16,
    "mamba_state_dim": 8,
    "mlp_activation": "gelu",
    "norm_eps": 1e-4,
    "rope_theta": 1000.0,
}
TARGET = "pretrain.models.hybrid.config.HybridConfig"


def test_frozen_fields_of_an_earlier_version_are_read_under_their_present_names():
    tree = with_renamed_fields({"run": {"name": "old"}, "model": {"_target_": TARGET, **FLAT}})
    assert tree["run"] == {"name": "old"}
    report = Report()
    expected = changed(SMALL, {"mlp.activation": "gelu", "norm.eps": 1e-4, "attention.rope_theta": 1000.0})
    assert check_component(tree["model"], "model", report) == expected
    assert report.violations == []
    assert with_renamed_fields(tree) == tree


def test_old_names_in_a_new_configuration_are_faults_that_name_the_new_ones():
    report = Report()
    assert check_component({"_target_": TARGET, **FLAT, "num_kv_heads": 3}, "model", report) is None
    fixes = {violation.path: violation.fix for violation in report.violations}
    assert fixes["model.mamba_head_dim"] == "write model.mamba2.head_dim instead"
    assert fixes.keys() == {f"model.{name}" for name in FLAT if name not in ("pattern", "width", "vocab_size")}


def test_thousands_of_layers_take_no_time():
    config = changed(SMALL, {"pattern": "M-*-" * 20_000})
    assert config.place(79_998).occurrence == 19_999
    assert model_cost(config, 64).parameters > 1e8


def test_fields_of_absent_layer_kinds_are_not_judged():
    assert faults(**{"pattern": "--", "attention.num_kv_heads": 3, "mamba2.groups": 3, "mamba2.head_dim": 7}) == {}


def test_head_dim_frees_heads_from_dividing_width():
    assert faults(**{"attention.num_heads": 5, "attention.num_kv_heads": 1, "attention.head_dim": 8}) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False, "mlp.activation": "gelu", "attention.num_kv_heads": None},
        {
            "mamba2.groups": 2,
            "mamba2.expand": 4,
            "attention.head_dim": 12,
            "mlp.activation": "relu2",
            "mlp.hidden_size": 40,
        },
        {"pattern": "mE*E", "moe.hidden_size": 24, "norm.kind": "layer", "norm.embedding": True},
        {"pattern": "M*m-", "norm.placement": "peri", "attention.qk_norm": True, "attention.gate": "head"},
        {"pattern": "M--", "mamba2.num_heads": 3, "norm.placement": "gru"},
    ],
)
def test_cost_matches_the_module_and_the_flop_counter(changes):
    config = changed(SMALL, {"mamba2.chunk_size": 16, **changes})
    model = config.build(TorchLayers())
    length = 48
    cost = model_cost(config, length)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(length, 2, dtype=torch.long))
    assert cost.flops_per_token * 2 * length == counter.get_total_flops()


def kept_bytes(config, length, batch_size, dtype):
    """What autograd keeps of a training step, loss included."""
    model = config.build(TorchLayers())
    model.reset_parameters(0)
    model.to(dtype)
    tokens_LB = torch.arange(length * batch_size).view(length, batch_size) % config.vocab_size
    targets_R = tokens_LB.flatten().roll(1)
    with measured_saves(model) as saves:
        cross_entropy_rows(model(tokens_LB).flatten(0, 1), targets_R)
    return saves.total_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "--"},
        {"pattern": "-", "tied_embeddings": False, "mlp.activation": "gelu"},
        {"pattern": "--", "norm.placement": "post"},
        {"pattern": "--", "norm.placement": "peri", "norm.embedding": True},
        {"pattern": "--", "norm.kind": "layer"},
        {"pattern": "--", "norm.kind": "layer1p", "norm.placement": "peri"},
        {"pattern": "--", "residual_fp32": True},
        {"pattern": "--", "norm.placement": "gru"},
        {"pattern": "--", "residual_fp32": True, "norm.placement": "post"},
        {"pattern": "--", "residual_fp32": True, "norm.placement": "peri", "norm.embedding": True},
        {"pattern": "-", "logit_softcap": 30.0},
        {"pattern": "-*-", "norm.embedding": True},
        {"pattern": "M*m-", "mamba2.chunk_size": 8, "mamba1.state_dim": 4, "attention.rope_theta": 1e4},
        {"pattern": "-E", "moe.hidden_size": 24},
    ],
)
def test_activation_bytes_are_what_a_training_step_keeps(changes, dtype):
    config = changed(SMALL, changes)
    length = 24
    measured = (kept_bytes(config, length, 2, dtype) - kept_bytes(config, length, 1, dtype)) / length
    stated = model_cost(config, length, dtype.itemsize).activation_bytes_per_token
    assert stated == pytest.approx(measured, rel=1e-12)


def test_state_bytes_are_what_a_cache_holds():
    config = changed(SMALL, {"pattern": "Mm*-*", "mamba2.chunk_size": 16, "attention.windows": (8, None)})
    model = config.build(TorchLayers())
    model.reset_parameters(0)
    for tokens in (1, 5, 40):
        cache = model.init_cache(1, torch.float32, "cpu")
        model.prefill(torch.zeros(tokens, 1, dtype=torch.long), cache)
        assert model_cost(config, tokens, 4).state_bytes == cache_bytes(cache.layers)


def test_costs_of_layers_ends_and_parts_add_up_to_the_model():
    costs = SMALL.layer_costs(64)
    assert len(costs) == SMALL.num_layers == 4
    assert costs[1] == costs[3] != costs[0]
    total = model_cost(SMALL, 64)
    assert sum(costs) + sum(SMALL.end_costs()) == total.flops_per_token
    parts = cost_by_part(SMALL, 64)
    assert list(parts) == ["embedding", "Mamba-2", "MLP", "attention", "norms", "head"]
    layers = sum((layer_cost(SMALL, layer, 64) for layer in range(4)), start=Cost())
    final_norm = parts["norms"].parameters // 5
    assert parts["embedding"].parameters + layers.parameters + final_norm == total.parameters


# ---- layouts

SHARED = changed(SMALL, {"attention.num_kv_heads": 4, "mamba2.groups": 4, "vocab_size": 64})


def layout_faults(config, tensor_parallel=2, sequence_parallel=False, sequence_length=None):
    violations = config.parallel_violations(tensor_parallel, sequence_parallel, sequence_length)
    return {field: (found, rule, fix) for field, found, rule, fix in violations}


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_layouts_that_fit_have_no_violations(tensor_parallel):
    assert layout_faults(SHARED, tensor_parallel, True, 16) == {}


@pytest.mark.parametrize(
    ("changes", "field", "found", "fix"),
    [
        ({"vocab_size": 61}, "vocab_size", 61, "64"),
        (
            {"attention.num_heads": 6, "attention.num_kv_heads": 2, "attention.head_dim": 8},
            "attention.num_heads",
            6,
            "8",
        ),
        ({"attention.num_kv_heads": 1}, "attention.num_kv_heads", 1, "4"),
        ({"mlp.hidden_size": 30}, "mlp.hidden_size", 30, "32"),
        ({"mamba2.groups": 2}, "mamba2.groups", 2, "4"),
        ({"mamba2.groups": 1}, "mamba2.groups", 1, "single group"),
    ],
)
def test_each_count_must_split_over_the_ranks(changes, field, found, fix):
    config = changed(SHARED, changes)
    assert list(config.violations()) == []
    faults = layout_faults(config, 4)
    assert faults[field][0] == found
    assert "4 tensor-parallel ranks" in faults[field][1]
    assert fix in faults[field][2]
    assert faults.keys() <= {field, "attention.num_kv_heads"}


def test_heads_given_by_number_must_split_over_the_ranks():
    config = changed(SHARED, {"mamba2.num_heads": 6, "mamba2.groups": 2})
    assert list(config.violations()) == []
    assert layout_faults(config, 4).keys() == {"mamba2.groups", "mamba2.num_heads"}


def test_layout_faults_are_reported_together_and_only_for_kinds_in_the_pattern():
    config = changed(SHARED, {"vocab_size": 61, "attention.num_kv_heads": 1, "mamba2.groups": 1, "mamba2.head_dim": 64})
    faults = layout_faults(config, 2, True, 15)
    assert set(faults) == {
        "vocab_size",
        "attention.num_kv_heads",
        "mamba2.groups",
        "mamba2.head_dim",
        "sequence_length",
    }
    assert "16" in faults["sequence_length"][2]
    assert "sequence_length" not in layout_faults(config, 2, False, 15)
    assert set(layout_faults(dataclasses.replace(config, pattern="--"), 2)) == {"vocab_size"}
    assert layout_faults(config, 1, False, 15) == {}


# ---- ratios

RATIOS = LayerRatios(num_layers=8, shares={"mamba2": 0.375, "attention": 0.125, "mlp": 0.5})


def test_ratios_stand_for_the_pattern_that_they_spread():
    written = changed(SMALL, {"pattern": "M-M-*-M-"})
    spread = changed(SMALL, {"pattern": None, "layer_ratios": RATIOS})
    assert list(spread.violations()) == []
    assert spread.layer_pattern == written.layer_pattern == written.pattern
    assert spread.num_layers == 8
    assert [spread.place(layer) for layer in range(8)] == [written.place(layer) for layer in range(8)]
    assert model_cost(spread, 64) == model_cost(written, 64)
    names = [name for name, _ in spread.build(TorchLayers()).named_parameters()]
    assert names == [name for name, _ in written.build(TorchLayers()).named_parameters()]


def test_pattern_and_ratios_together_are_refused():
    found = faults(layer_ratios=RATIOS)
    assert list(found) == ["pattern"]
    assert "given twice" in found["pattern"][1]


def test_faulty_ratios_are_reported_with_the_rest_of_the_model():
    broken = LayerRatios(num_layers=8, shares={"mamba2": 0.5, "mamba": 0.4})
    found = faults(pattern=None, layer_ratios=broken, vocab_size=0)
    assert set(found) == {"layer_ratios.shares.mamba", "layer_ratios.shares", "vocab_size"}
    assert "mamba2" in found["layer_ratios.shares.mamba"][2]
    with pytest.raises(ValueError, match=r"layer_ratios\.shares\.mamba"):
        changed(SMALL, {"pattern": None, "layer_ratios": broken}).build(TorchLayers())


def test_ratios_can_be_written_in_a_file():
    fields = yaml.safe_load(
        """
        _target_: pretrain.models.hybrid.config.HybridConfig
        layer_ratios: {num_layers: 8, shares: {mamba2: 0.375, attention: 0.125, mlp: 0.5}}
        width: 32
        vocab_size: 64
        attention: {num_heads: 4}
        mamba2: {head_dim: 16}
        """
    )
    report = Report()
    config = check_component(fields, "model", report)
    assert report.violations == []
    assert config.layer_pattern == "M-M-*-M-"
    fields["layer_ratios"]["shares"]["mlp"] = "half"
    check_component(fields, "model", report)
    assert [violation.path for violation in report.violations] == ["model.layer_ratios.shares.mlp"]


@pytest.mark.parametrize(("name", "low", "high"), [("hybrid_3m", 2e6, 3e6), ("hybrid_tiny", 1e4, 1e5)])
def test_shipped_configurations_are_valid_and_of_the_stated_size(name, low, high):
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert fields["_target_"] == "pretrain.models.hybrid.config.HybridConfig"
    report = Report()
    config = check_component(fields, "model", report)
    assert report.violations == []
    assert low < model_cost(config, 512).parameters < high


def test_configuration_and_cost_do_not_import_torch():
    modules = "pretrain.models.hybrid.cost, pretrain.objectives.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
