"""The same model classes split over tensor-parallel ranks and pipeline stages, against the whole model on one rank."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from support.hybrid import changed, hybrid
from support.logical import logical_tensors
from support.tensor_parallel import copy_shares, megatron_layers, parts_of, share, sum_replicated_gradients

from pretrain.objectives.config import NextTokenConfig
from pretrain.parallel.layers import TorchLayers
from pretrain.parallel.stage import Stage

CONFIG = hybrid(
    pattern="M-M*-",
    width=32,
    vocab_size=64,
    attention__num_heads=8,
    attention__num_kv_heads=4,
    attention__rope_theta=1000.0,
    mamba2__head_dim=8,
    mamba2__state_dim=6,
    mamba2__groups=4,
    mamba2__chunk_size=8,
    mlp__ratio=2.0,
    init_std=0.2,
)
LENGTH = 24
STAGES = [Stage(0, 2, True, False), Stage(2, 3, False, False), Stage(3, 5, False, True)]


def make_batch():
    """Two rows: one of three documents and padding, one of a single document."""
    generator = torch.Generator().manual_seed(3)
    batch = {name: torch.randint(0, 64, (2, LENGTH), generator=generator) for name in ("tokens", "targets")}
    lengths = [[9, 1, 10, 4], [LENGTH]]
    ids = [[0, 1, 2, -1], [0]]
    rows = [[i for i, n in zip(ids[r], lengths[r], strict=True) for _ in range(n)] for r in range(2)]
    batch["seq_idx"] = torch.tensor(rows)
    batch["position_ids"] = torch.tensor([[p for n in lengths[r] for p in range(n)] for r in range(2)])
    batch["loss_mask"] = batch["seq_idx"] >= 0
    return batch


def whole_model(config, dtype=torch.float64):
    """Away from the initial ones of norms and D, which would hide a wrong share."""
    model = config.build(TorchLayers())
    model.reset_parameters(0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def run(model, batch):
    """Logits, loss sum; gradients are left in the parameters."""
    kept = []
    handle = model.register_forward_hook(lambda module, inputs, output: kept.append(output.detach()))
    loss = NextTokenConfig(z_loss=0.01).build()(model, batch).loss_sum
    handle.remove()
    loss.backward()
    return kept[0], loss.detach()


def compare_with_whole(rank, size, config, sequence_parallel, dtype, rtol):
    whole = whole_model(config, dtype)
    model = config.build(megatron_layers(size, sequence_parallel, dtype)).to(dtype)
    copy_shares(whole, model, rank, size)
    batch = make_batch()
    logits, loss = run(model, batch)
    expected_logits, expected_loss = run(whole, batch)
    scale = float(expected_logits.abs().max())
    torch.testing.assert_close(logits, expected_logits.chunk(size, -1)[rank], rtol=rtol, atol=rtol * scale)
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=0)
    sum_replicated_gradients(model, sequence_parallel)
    expected = parts_of(whole, gradients=True)
    gradients = parts_of(model, gradients=True)
    assert gradients.keys() == expected.keys()
    for name, (part, gradient) in gradients.items():
        wanted = expected[name][1]
        tolerance = 10 * rtol * float(wanted.abs().max())

        def message(text, name=name):
            return f"{name}: {text}"

        torch.testing.assert_close(
            gradient, share(part, wanted, rank, size), rtol=10 * rtol, atol=tolerance, msg=message
        )
    check_gradient_norm(model, whole)
    return sum(1 for part, _ in gradients.values() if part.shape != part.local_shape)


def check_gradient_norm(model, whole):
    """Megatron's attributes select every element exactly once for the gradient norm."""
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

    counted = [p.grad for p in model.parameters() if param_is_not_tensor_parallel_duplicate(p)]
    total = torch.stack([g.double().square().sum() for g in counted]).sum()
    dist.all_reduce(total)
    expected = sum(float(p.grad.double().square().sum()) for p in whole.parameters())
    assert float(total) == pytest.approx(expected, rel=1e-4)


EXACT = (torch.float64, 1e-11)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("pattern", ["M-M*-", "*-*-", "MM"])
def test_two_tensor_parallel_ranks_equal_the_whole_model(worker_pools, pattern, sequence_parallel):
    tied = sequence_parallel == (pattern == "MM")  # each pattern is run tied and untied
    config = dataclasses.replace(CONFIG, pattern=pattern, tied_embeddings=tied)
    assert min(worker_pools(2, "megatron").run(compare_with_whole, config, sequence_parallel, *EXACT)) > 5


@pytest.mark.distributed
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_ungated_mlps_in_float32(worker_pools, activation):
    config = changed(CONFIG, {"mlp.activation": activation, "attention.rope_theta": None})
    worker_pools(2, "megatron").run(compare_with_whole, config, activation == "gelu", torch.float32, 2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_four_tensor_parallel_ranks_equal_the_whole_model(worker_pools, sequence_parallel):
    """One group and one key/value head a rank."""
    config = dataclasses.replace(CONFIG, tied_embeddings=sequence_parallel)
    worker_pools(4, "megatron").run(compare_with_whole, config, sequence_parallel, *EXACT)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("gate", ["head", "feature", "none"])
def test_options_of_attention_and_norms(worker_pools, gate, sequence_parallel):
    """Weights that all heads share (q_norm, k_norm) get gradients from the heads of every rank."""
    options = {
        "pattern": "*-*",
        "attention.qk_norm": True,
        "attention.qkv_bias": True,
        "attention.out_bias": True,
        "attention.rope_fraction": 0.5,
        "attention.windows": (6, None),
        "attention.softcap": 4.0,
        "attention.clip_gamma": -0.01,
        "attention.gate": gate,
        "norm.kind": "layer1p",
        "norm.placement": {"head": "peri", "feature": "post", "none": "gru"}[gate],
        "norm.embedding": True,
        "logit_softcap": 8.0,
        "residual_fp32": True,
        "tied_embeddings": sequence_parallel,
    }
    workers = worker_pools(2, "megatron")
    assert min(workers.run(compare_with_whole, changed(CONFIG, options), sequence_parallel, *EXACT)) > 5


def compare_group_of_one(rank, size, config, dtype):
    whole = whole_model(config, dtype)
    model = config.build(megatron_layers(1, dtype=dtype)).to(dtype)
    assert model.vocabulary is None
    copy_shares(whole, model, 0, 1)
    batch = make_batch()
    assert all(torch.equal(a, b) for a, b in zip(run(model, batch), run(whole, batch), strict=True))
    expected = parts_of(whole, gradients=True)
    return [
        name
        for name, (_, tensor) in parts_of(model, gradients=True).items()
        if not torch.equal(tensor, expected[name][1])
    ]


@pytest.mark.distributed
def test_without_a_split_megatrons_layers_compute_the_same_bits(worker_pools):
    assert worker_pools(2, "megatron").run(compare_group_of_one, CONFIG, torch.float32) == [[], []]


def initial_shares(rank, size, config):
    whole = config.build(TorchLayers())
    whole.reset_parameters(4)
    model = config.build(megatron_layers(size, dtype=torch.float32))
    model.reset_parameters(4)
    values = parts_of(whole)
    local = parts_of(model)
    assert list(local) == list(values)
    for name, (part, tensor) in local.items():
        assert torch.equal(tensor, share(part, values[name][1], rank, size)), name
    numels = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in whole.parameters())
    return [name for name, parameter in model.named_parameters()], numels


@pytest.mark.distributed
def test_initial_values_are_shares_of_the_same_logical_tensors(worker_pools):
    config = dataclasses.replace(CONFIG, tied_embeddings=False)
    for names, (held, whole) in worker_pools(2, "megatron").run(initial_shares, config):
        assert names == [name for name, _ in config.build(TorchLayers()).named_parameters()]
        assert held < 0.52 * whole  # only the norms between layers and final norm are held twice


def staged(config, layers, dtype=torch.float64):
    stages = [config.build(layers, stage) for stage in STAGES]
    for stage in stages:
        stage.reset_parameters(0)
        stage.to(dtype)
    return stages


def run_stages(stages, batch):
    """Forward and backward stage by stage, handing over detached hidden states and their gradients."""
    tokens = batch["tokens"].t(), batch["seq_idx"].t(), batch["position_ids"].t()
    inputs, outputs, hidden = [], [], None
    for stage in stages:
        inputs.append(hidden)
        outputs.append(stage(*tokens, hidden_LBD=hidden))
        hidden = outputs[-1].detach().requires_grad_()
    gradient = torch.ones_like(outputs[-1])
    for given, output in zip(reversed(inputs), reversed(outputs), strict=True):
        output.backward(gradient)
        gradient = None if given is None else given.grad
    return outputs


@pytest.mark.parametrize("tied", [True, False])
def test_stages_in_a_row_are_the_whole_model_bit_for_bit(tied):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    whole = config.build(TorchLayers())
    whole.reset_parameters(0)
    whole.double()
    stages = staged(config, TorchLayers())
    batch = make_batch()
    logits = whole(batch["tokens"].t(), batch["seq_idx"].t(), batch["position_ids"].t())
    logits.backward(torch.ones_like(logits))
    outputs = run_stages(stages, batch)
    assert torch.equal(outputs[-1], logits)
    assert outputs[0].shape == (LENGTH, 2, 32)

    expected = dict(whole.named_parameters())
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert (name in gradients) == (name == "embedding.weight" and tied and stage.stage.has_head)
            gradients[name] = parameter.grad + gradients.get(name, 0.0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name].grad), name


def test_the_copy_of_a_tied_embedding_is_marked_and_starts_equal():
    first, middle, last = staged(CONFIG, TorchLayers(), torch.float32)
    owner, copy = first.shared_embedding_weight(), last.shared_embedding_weight()
    assert middle.shared_embedding_weight() is None
    assert not list(middle.embedding.parameters() if hasattr(middle, "embedding") else [])
    assert torch.equal(owner, copy)
    assert owner.shared_embedding
    assert copy.shared_embedding
    assert copy.shared
    assert not hasattr(owner, "shared")
    untied = dataclasses.replace(CONFIG, tied_embeddings=False).build(TorchLayers(), STAGES[2])
    assert untied.shared_embedding_weight() is None
    assert "embedding.weight" not in logical_tensors(untied)


def stages_with_sequence_parallel(rank, size, config):
    batch = make_batch()
    model = config.build(megatron_layers(size, sequence_parallel=True))
    model.reset_parameters(0)
    model.double()
    logits = model(batch["tokens"].t(), batch["seq_idx"].t(), batch["position_ids"].t())
    outputs = run_stages(staged(config, megatron_layers(size, sequence_parallel=True)), batch)
    assert torch.equal(outputs[-1], logits)
    return [tuple(output.shape) for output in outputs]


@pytest.mark.distributed
def test_stages_hand_over_a_share_of_the_sequence(worker_pools):
    for shapes in worker_pools(2, "megatron").run(stages_with_sequence_parallel, CONFIG):
        assert shapes == [(LENGTH // 2, 2, 32), (LENGTH // 2, 2, 32), (LENGTH, 2, 32)]


def recompute(model, sequence_parallel=None):
    """(logits, loss, gradients), and how often each layer ran, with and without activation checkpointing."""
    results, calls = [], []
    for on in (False, True):
        model.zero_grad()
        model.activation_checkpointing = on
        count = dict.fromkeys(model.layers, 0)

        def add(module, inputs, key, count=count):
            count[key] += 1

        handles = [
            layer.mixer.register_forward_pre_hook(lambda m, i, key=key, add=add: add(m, i, key))
            for key, layer in model.layers.items()
        ]
        results.append([*run(model, make_batch()), *(p.grad for p in model.parameters())])
        for handle in handles:
            handle.remove()
        calls.append(set(count.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return calls


def test_activation_checkpointing_computes_layers_again_with_the_same_bits():
    model = whole_model(CONFIG, torch.float32)
    assert recompute(model) == [{1}, {2}]
    model.eval()
    assert recompute(model) == [{1}, {1}]


def recompute_in_parallel(rank, size, config):
    whole = whole_model(config)
    model = config.build(megatron_layers(size, sequence_parallel=True)).double()
    copy_shares(whole, model, rank, size)
    return recompute(model)


@pytest.mark.distributed
def test_activation_checkpointing_repeats_the_collectives_of_a_layer(worker_pools):
    assert worker_pools(2, "megatron").run(recompute_in_parallel, CONFIG) == [[{1}, {2}]] * 2
