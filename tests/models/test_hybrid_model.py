"""The hybrid language model: parity, packing, generation, initialisation."""

import dataclasses

import pytest
import torch
from support.hybrid import changed, hybrid
from support.logical import logical_tensors

from pretrain.models.generation import generate
from pretrain.nn.layout import SequenceLayout
from pretrain.parallel.layers import TorchLayers

CONFIG = hybrid(
    pattern="M-M*-",
    width=32,
    vocab_size=61,
    attention__num_heads=4,
    attention__num_kv_heads=2,
    attention__rope_theta=1000.0,
    mamba2__head_dim=8,
    mamba2__state_dim=6,
    mamba2__groups=2,
    mamba2__chunk_size=8,
    mlp__ratio=2.0,
    init_std=0.2,
)


def make_model(dtype=torch.float64, seed=0, **changes):
    model = changed(CONFIG, {name.replace("__", "."): value for name, value in changes.items()}).build(TorchLayers())
    model.reset_parameters(seed)
    return model.to(dtype)


def random_tokens(length, batch_size):
    return torch.randint(0, 61, (length, batch_size), generator=torch.Generator().manual_seed(1))


# ---- parity with an independent implementation


def copy_to_nemotron(model, theirs):
    with torch.no_grad():
        theirs.model.embeddings.weight.copy_(model.embedding.weight)
        theirs.model.norm_f.weight.copy_(model.final_norm.weight)
        theirs.lm_head.weight.copy_(model.head.weight)
        for symbol, ours, layer in zip(model.config.pattern, model.layers.values(), theirs.model.layers, strict=True):
            layer.norm.weight.copy_(ours.norm.weight)
            mixer, target = ours.mixer, layer.mixer
            if symbol == "M":
                target.in_proj.weight.copy_(mixer.in_proj.weight)
                target.conv1d.weight.copy_(mixer.conv.weight.unsqueeze(1))
                target.conv1d.bias.copy_(mixer.conv.bias)
                target.norm.weight.copy_(mixer.norm.weight)
                target.out_proj.weight.copy_(mixer.out_proj.weight)
                for name in ("A_log", "D", "dt_bias"):
                    getattr(target, name).copy_(getattr(mixer, name))
            elif symbol == "*":
                pieces = logical_tensors(mixer.qkv)
                for component in "qkv":
                    getattr(target, f"{component}_proj").weight.copy_(pieces[f"{component}.weight"])
                target.o_proj.weight.copy_(mixer.out_proj.weight)
            else:
                target.up_proj.weight.copy_(mixer.in_proj.weight)
                target.down_proj.weight.copy_(mixer.out_proj.weight)


def test_hybrid_matches_transformers_nemotron_h():
    from transformers import NemotronHConfig, NemotronHForCausalLM

    model = make_model(torch.float32, attention__rope_theta=None, mlp__activation="relu2", tied_embeddings=False)
    config = NemotronHConfig(
        vocab_size=61,
        hidden_size=32,
        hybrid_override_pattern="M-M*-",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        ssm_state_size=6,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        expand=2,
        chunk_size=8,
        layer_norm_epsilon=CONFIG.norm.eps,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = NemotronHForCausalLM(config).eval()
    copy_to_nemotron(model, theirs)
    theirs.model.layers[0].mixer.time_step_limit = (0.0, float("inf"))
    theirs.model.layers[2].mixer.time_step_limit = (0.0, float("inf"))
    tokens = random_tokens(21, 2)
    with torch.no_grad():
        expected_BLV = theirs(tokens.t().contiguous(), use_cache=False).logits
        logits_LBV = model(tokens)
    torch.testing.assert_close(logits_LBV.transpose(0, 1), expected_BLV, rtol=1e-4, atol=1e-5)
    assert float(expected_BLV.std()) > 0.1  # the comparison is not between zeros


# ---- packed documents


def test_packed_documents_equal_separate_ones_in_logits_and_gradients():
    model = make_model()
    lengths = [7, 1, 12, 3]
    packed = random_tokens(sum(lengths), 1)
    documents = packed.split(lengths)
    segments = torch.cat([torch.full((n, 1), i) for i, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n).unsqueeze(1) for n in lengths])
    padding = torch.zeros(4, 1, dtype=torch.long)
    packed_logits = model(
        torch.cat((packed, padding)), torch.cat((segments, padding - 1)), torch.cat((positions, padding))
    )[:-4]
    weights = torch.randn_like(packed_logits)
    packed_grads = torch.autograd.grad((packed_logits * weights).sum(), model.parameters())

    separate_logits = torch.cat([model(document) for document in documents])
    separate_grads = torch.autograd.grad((separate_logits * weights).sum(), model.parameters())
    torch.testing.assert_close(packed_logits, separate_logits, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(packed_grads, separate_grads, rtol=1e-7, atol=1e-9)


def test_no_future_token_changes_a_logit():
    model, tokens = make_model(), random_tokens(20, 1)
    changed = tokens.clone()
    changed[13:] = (changed[13:] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:13], after[:13])
    assert not torch.equal(before[13:], after[13:])


# ---- generation


@pytest.mark.parametrize("prompt_length", [1, 2, 9])
@pytest.mark.parametrize("rope_theta", [None, 1000.0])
def test_prefill_and_decode_agree_with_the_full_forward_everywhere(prompt_length, rope_theta):
    model, tokens = make_model(attention__rope_theta=rope_theta), random_tokens(30, 2)
    expected = model(tokens)
    cache = model.init_cache(2, torch.float64, "cpu")
    pieces = [model.prefill(tokens[:prompt_length], cache)]
    pieces += [model.decode(token_B, cache).unsqueeze(0) for token_B in tokens[prompt_length:]]
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-7, atol=1e-8)
    assert cache.length == 30


def test_mamba_cache_does_not_grow():
    model, tokens = make_model(pattern="MM"), random_tokens(40, 1)
    cache = model.init_cache(1, torch.float64, "cpu")
    model.prefill(tokens[:5], cache)
    sizes = [(c.conv_state_KBC.shape, c.ssm_state_BHPN.shape) for c in cache.layers]
    for token_B in tokens[5:]:
        model.decode(token_B, cache)
    assert [(c.conv_state_KBC.shape, c.ssm_state_BHPN.shape) for c in cache.layers] == sizes
    assert all(c.conv_state_KBC.untyped_storage().nbytes() <= 4 * c.conv_state_KBC.nbytes for c in cache.layers)


def test_prefill_refuses_a_used_cache_and_an_empty_prompt():
    model = make_model()
    cache = model.init_cache(1, torch.float64, "cpu")
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(torch.zeros(0, 1, dtype=torch.long), cache)
    model.prefill(random_tokens(3, 1), cache)
    with pytest.raises(ValueError, match="cache of length 3"):
        model.prefill(random_tokens(3, 1), cache)


def test_greedy_generation_follows_the_full_forward():
    model = make_model()
    tokens = [5, 6, 7]
    new = generate(model, tokens, max_new_tokens=12, temperature=0)
    for token in new:
        assert token == int(model(torch.tensor(tokens).unsqueeze(1))[-1, 0].argmax())
        tokens.append(token)
    assert len(new) == 12


def test_sampling_is_keyed_and_a_longer_run_starts_like_a_shorter_one():
    model = make_model()
    short = generate(model, [5], 8, temperature=1.0, seed=3)
    torch.manual_seed(99)
    assert generate(model, [5], 16, temperature=1.0, seed=3)[:8] == short
    assert any(generate(model, [5], 8, temperature=1.0, seed=s) != short for s in range(4, 8))


def test_top_k_one_is_greedy_and_stop_token_ends_the_text():
    model = make_model()
    greedy = generate(model, [5], 10, temperature=0)
    assert generate(model, [5], 10, temperature=2.0, top_k=1, seed=1) == greedy
    stop = greedy[4]
    assert generate(model, [5], 10, temperature=0, stop_token=stop) == greedy[: greedy.index(stop) + 1]


def test_generation_restores_the_training_mode_and_refuses_bad_arguments():
    model = make_model().train()
    generate(model, [1], 2)
    assert model.training
    for arguments, message in (
        ({"prompt_tokens": []}, "empty prompt"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, **({"prompt_tokens": [1], "max_new_tokens": 2} | arguments))


# ---- initialisation and names


def test_initial_values_depend_on_seed_and_name_only():
    model = make_model(torch.float32)
    torch.manual_seed(5)
    wider = dataclasses.replace(CONFIG, pattern="M-M*-M").build(TorchLayers())
    wider.reset_parameters(0)
    shared = logical_tensors(wider)
    for name, tensor in logical_tensors(model).items():
        ratio = (5 / 6) ** 0.5 if name.endswith("out_proj.weight") else 1.0
        torch.testing.assert_close(shared[name], tensor * ratio)
    other = dict(make_model(torch.float32, seed=1).named_parameters())
    assert not torch.equal(other["embedding.weight"], model.embedding.weight)
    assert not torch.equal(model.layers["0"].mixer.in_proj.weight, model.layers["2"].mixer.in_proj.weight)


def test_components_are_drawn_by_their_own_names():
    """A fused projection starts with the very values that separate parameters of those names would get."""
    from pretrain.ops.keyed_random import keyed_generator

    model = make_model(torch.float32)
    values = torch.empty(16, 32).normal_(
        0, 0.2, generator=keyed_generator(0, "initialisation", "layers.3.mixer.qkv.k.weight")
    )
    torch.testing.assert_close(model.layers["3"].mixer.qkv.weight[32:48], values)


def test_initial_distributions():
    model = make_model(torch.float32, width=256, mamba2__head_dim=2, init_std=0.02)
    mixer = model.layers["0"].mixer
    decay = mixer.A_log.detach().exp()
    assert 1 <= float(decay.min()) < 1.5
    assert 15 < float(decay.max()) <= 16
    step = torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert 1e-3 * 0.999 <= float(step.min()) < 2e-3
    assert 0.05 < float(step.max()) <= 0.1001
    assert abs(float(step.log().mean()) - (torch.tensor([1e-3, 0.1]).log().mean())) < 0.25
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(mixer.in_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    for layer in model.layers.values():
        assert float(layer.mixer.out_proj.weight.detach().std()) == pytest.approx(0.02 / 5**0.5, rel=0.05)
        assert torch.equal(layer.norm.weight, torch.ones(256))
    assert float(mixer.conv.weight.detach().abs().max()) <= 0.5


def test_canonical_names_and_full_coverage():
    model = make_model(tied_embeddings=False)
    tensors = logical_tensors(model)
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    names = list(tensors)
    mamba = {name.removeprefix("layers.0.") for name in names if name.startswith("layers.0.")}
    assert mamba == {
        "norm.weight",
        *(f"mixer.in_proj.{c}.weight" for c in ("z", "x", "B", "C", "dt")),
        *(f"mixer.conv.{c}.{p}" for c in "xBC" for p in ("weight", "bias")),
        *(f"mixer.{p}" for p in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")),
    }
    assert {"embedding.weight", "final_norm.weight", "head.weight", "layers.3.mixer.qkv.q.weight"} <= set(names)
    assert {"layers.1.mixer.in_proj.gate.weight", "layers.1.mixer.in_proj.up.weight"} <= set(names)


def test_weight_decay_exemptions():
    exempt = {n for n, p in make_model().named_parameters() if getattr(p, "no_weight_decay", False)}
    vectors = {n for n, p in make_model().named_parameters() if p.dim() == 1}
    assert exempt == vectors
    assert "layers.0.mixer.A_log" in exempt


def test_bf16_stays_close_to_fp32():
    model, tokens = make_model(torch.float32, init_std=0.05), random_tokens(16, 2)
    with torch.no_grad():
        expected = model(tokens)
        model.bfloat16()
        logits = model(tokens)
        cache = model.init_cache(2, torch.bfloat16, "cpu")
        prefilled = model.prefill(tokens[:15], cache)
        decoded = model.decode(tokens[15], cache)
    assert logits.dtype == torch.bfloat16
    scale = float(expected.abs().max())
    assert float((logits.float() - expected).abs().max()) < 0.05 * scale
    assert float((prefilled.float() - expected[:15]).abs().max()) < 0.05 * scale
    assert float((decoded.float() - expected[15]).abs().max()) < 0.05 * scale


@pytest.mark.parametrize("pattern", ["M", "*", "-", "M-M*-"])
def test_every_layer_kind_learns_to_tell_a_fixed_sequence(pattern):
    """Each pattern beats the entropy of the next token given nothing; all parameters receive gradients."""
    from pretrain.objectives.config import NextTokenConfig

    model = make_model(torch.float32, pattern=pattern, init_std=0.05)
    sequence = torch.randperm(61, generator=torch.Generator().manual_seed(2))
    batch = {
        "tokens": sequence[:-1].repeat(2, 1),
        "targets": sequence[1:].repeat(2, 1),
        "loss_mask": torch.ones(2, 60, dtype=torch.bool),
        "seq_idx": torch.zeros(2, 60, dtype=torch.int32),
        "position_ids": torch.arange(60).repeat(2, 1),
    }
    objective = NextTokenConfig().build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        loss = objective(model, batch).loss_sum / objective.denominator(batch)
        loss.backward()
        if step == 1:
            assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters())
        optimizer.step()
    assert float(loss.detach()) < 1.0


# ---- norms, residual stream and logits


def norm_formula(norm, x, shifted):
    y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + CONFIG.norm.eps)
    return y * (norm.weight + shifted) + norm.bias


def random_norms(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "gru"])
def test_the_ends_of_the_model_match_their_formulas(placement):
    """Embedding, its norm, the layers, the final norm (none after post-norm layers), the head and its soft cap."""
    changes = {"norm__kind": "layer1p", "norm__embedding": True, "norm__placement": placement}
    model = random_norms(make_model(logit_softcap=2.0, **changes))
    tokens = random_tokens(9, 2)
    layout = SequenceLayout(9, 2, torch.device("cpu"))
    x = norm_formula(model.embedding_norm, model.embedding.weight[tokens], 1)
    for layer in model.layers.values():
        x = layer(x, layout)
    assert hasattr(model, "final_norm") == (placement != "post")
    if placement != "post":
        x = norm_formula(model.final_norm, x, 1)
    logits = 2.0 * torch.tanh(x @ model.embedding.weight.t() / 2.0)
    torch.testing.assert_close(model(tokens), logits, rtol=1e-9, atol=1e-9)
    assert float(logits.detach().abs().max()) > 0.5  # the cap acts


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "gru"])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer1p"])
def test_names_and_counts_of_norms(kind, placement):
    config = changed(CONFIG, {"norm.kind": kind, "norm.placement": placement, "norm.embedding": True})
    model = config.build(TorchLayers())
    model.reset_parameters(0)
    fields = ["weight"] if kind == "rms" else ["weight", "bias"]
    norms = ["embedding_norm", *([] if placement == "post" else ["final_norm"])]
    norms += [f"layers.{i}.{n}" for i in range(5) for n in ("norm", "out_norm") if n == "norm" or placement == "peri"]
    found = {name for name, _ in model.named_parameters() if "norm" in name and ".mixer." not in name}
    assert found == {f"{norm}.{field}" for norm in norms for field in fields}
    expected = 0.0 if kind == "layer1p" else 1.0
    assert all(torch.equal(model.get_parameter(f"{norm}.weight"), torch.full((32,), expected)) for norm in norms)


def test_a_residual_stream_in_fp32_loses_less():
    """bf16 parameters: the stream between layers is fp32, mixers and logits are bf16, and the error shrinks."""
    config = changed(CONFIG, {"pattern": "*-" * 16, "residual_fp32": True})
    models = {}
    for kept in (True, False):
        models[kept] = dataclasses.replace(config, residual_fp32=kept).build(TorchLayers())
        models[kept].reset_parameters(0)
    tokens = random_tokens(16, 2)
    with torch.no_grad():
        models[False].bfloat16()
        exact_model = make_model(pattern="*-" * 16)
        exact_model.load_state_dict(models[False].state_dict())
        exact = exact_model.double()(tokens)
        seen = []
        models[True].bfloat16()
        for layer in models[True].layers.values():
            layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
        errors = {}
        for kept, model in models.items():
            logits = model(tokens)
            assert logits.dtype == torch.bfloat16
            errors[kept] = float((logits.double() - exact).square().mean().sqrt())
    assert set(seen) == {(torch.float32, torch.float32)}
    assert errors[True] < 0.8 * errors[False]


def test_a_residual_stream_in_fp32_changes_nothing_for_fp32_parameters():
    tokens = random_tokens(16, 2)
    assert torch.equal(make_model(torch.float32)(tokens), make_model(torch.float32, residual_fp32=True)(tokens))


ALL_OPTIONS = {
    "norm__placement": "peri",
    "norm__embedding": True,
    "logit_softcap": 5.0,
    "residual_fp32": True,
    "attention__qk_norm": True,
    "attention__windows": (4,),
    "attention__softcap": 3.0,
    "attention__clip_gamma": -0.01,
    "attention__gate": "head",
    "attention__rope_fraction": 0.5,
}


def test_generation_agrees_with_the_full_forward_with_all_options():
    model, tokens = random_norms(make_model(pattern="M*-*", **ALL_OPTIONS)), random_tokens(20, 2)
    expected = model(tokens)
    cache = model.init_cache(2, torch.float64, "cpu")
    pieces = [model.prefill(tokens[:6], cache)]
    pieces += [model.decode(token_B, cache).unsqueeze(0) for token_B in tokens[6:]]
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-6, atol=1e-7)
