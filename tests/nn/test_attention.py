"""Attention with all options against the written-out formula in float64, and against classes of transformers."""

import dataclasses
import math

import pytest
import torch
from support.cost_case import activation_bytes_per_token, build, check_cost, forward_flops, state_bytes

from pretrain.nn.attention import Attention
from pretrain.nn.attention_config import AttentionConfig, RopeScaling
from pretrain.nn.initialisation import initialise
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mixer_config import Place
from pretrain.ops import attention_tiles
from pretrain.parallel.layers import TorchLayers

CPU = torch.device("cpu")
WIDTH = 12
OPTIONS = {
    "plain": {},
    "rope": {"rope_theta": 100.0},
    "partial rope": {"rope_theta": 100.0, "rope_fraction": 0.67},
    "scaled rope": {
        "rope_theta": 100.0,
        "rope_scaling": RopeScaling(kind="llama3", factor=3.0, original_max_position_embeddings=12),
    },
    "one key head": {"num_kv_heads": 1, "rope_theta": 100.0},
    "as many key heads": {"num_kv_heads": 4},
    "biases": {"qkv_bias": True, "out_bias": True},
    "qk norm": {"qk_norm": True, "rope_theta": 100.0},
    "qk norm without rope": {"qk_norm": True},
    "window": {"windows": (4,), "rope_theta": 100.0},
    "window of one": {"windows": (1,)},
    "soft cap": {"softcap": 1.5},
    "clip": {"clip_gamma": -0.1, "clip_zeta": 1.2},
    "head gate": {"gate": "head"},
    "feature gate": {"gate": "feature"},
    "feature gate with bias": {"gate": "feature", "qkv_bias": True},
    "all": {
        "num_kv_heads": 1,
        "rope_theta": 100.0,
        "rope_fraction": 0.67,
        "qkv_bias": True,
        "out_bias": True,
        "qk_norm": True,
        "windows": (5,),
        "softcap": 2.0,
        "clip_gamma": -0.05,
        "gate": "feature",
    },
}
SEGMENTS = torch.tensor(
    [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3]]
)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 0]])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that short documents share tiles and longer ones are cut, at the lengths of these tests."""
    monkeypatch.setattr(attention_tiles, "QUERIES", 4)


def make_attention(place=None, dtype=torch.float64, **options):
    config = AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 6} | options)
    place = place or Place(width=WIDTH)
    assert not list(config.violations(place.width, 8))
    layer = Attention(TorchLayers(), place, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            start = 1.0 if "norm" in name else 0.0
            parameter.copy_(start + 0.4 * torch.randn(parameter.shape, generator=generator))
    return layer.to(dtype), config


def frequency(config, turned, i):
    """As in Llama 3.1: by wavelength."""
    base = config.rope_theta ** (-2 * i / turned)
    scaling = config.rope_scaling
    if scaling is None:
        return base
    wavelength, context = 2 * math.pi / base, scaling.original_max_position_embeddings
    if wavelength < context / scaling.high_freq_factor:
        return base
    if wavelength > context / scaling.low_freq_factor:
        return base / scaling.factor
    smooth = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * base / scaling.factor + smooth * base


def formula(layer, config, x_LBD, seq_idx_LB=None, position_ids_LB=None):
    """One query at a time, with plain loops; zero attention output at padding."""
    length, batch_size, _ = x_LBD.shape
    heads, kv_heads, dim = config.num_heads, config.kv_heads, config.head_dim
    parameters = dict(layer.named_parameters())

    def linear(name, x):
        y = parameters[f"{name}.weight"] @ x
        return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y

    def head(x, number, kind, position):
        first = {"q": 0, "k": heads, "v": heads + kv_heads}[kind] + number
        vector = linear("qkv", x)[first * dim : (first + 1) * dim]
        if kind == "v":
            return vector
        if config.qk_norm:
            vector = vector / torch.sqrt((vector**2).mean() + 1e-5) * parameters[f"{kind}_norm.weight"]
        if config.rope_theta is None:
            return vector
        turned = int(dim * config.rope_fraction)
        rotated = vector.clone()
        for i in range(turned // 2):
            angle = position * frequency(config, turned, i)
            a, b = vector[i], vector[i + turned // 2]
            rotated[i] = a * math.cos(angle) - b * math.sin(angle)
            rotated[i + turned // 2] = b * math.cos(angle) + a * math.sin(angle)
        return rotated

    window = config.window(0) or length
    out = []
    for i in range(length):
        for b in range(batch_size):
            positions = range(length) if position_ids_LB is None else position_ids_LB[:, b].tolist()
            ids = [0] * length if seq_idx_LB is None else seq_idx_LB[:, b].tolist()
            seen = [j for j in range(i + 1) if ids[j] == ids[i] and i - j < window]
            rows = []
            for h in range(heads):
                kv = h // (heads // kv_heads)
                query = head(x_LBD[i, b], h, "q", positions[i])
                keys = torch.stack([head(x_LBD[j, b], kv, "k", positions[j]) for j in seen])
                values = torch.stack([head(x_LBD[j, b], kv, "v", positions[j]) for j in seen])
                scores = keys @ query / math.sqrt(dim)
                if config.softcap is not None:
                    scores = config.softcap * torch.tanh(scores / config.softcap)
                weights = scores.exp() / scores.exp().sum()
                if config.clip_gamma is not None:
                    weights = ((config.clip_zeta - config.clip_gamma) * weights + config.clip_gamma).clamp(0, 1)
                rows.append(weights @ values if ids[i] >= 0 else torch.zeros(dim, dtype=x_LBD.dtype))
            y = torch.stack(rows)
            if config.gate != "none":
                y = y * torch.sigmoid(linear("gate", x_LBD[i, b])).view(heads, -1)
            out.append(linear("out_proj", y.flatten()))
    return torch.stack(out).view(length, batch_size, -1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_match_the_formula(name, packed):
    layer, config = make_attention(**OPTIONS[name])
    length = 15 if packed else 9
    x = torch.randn(length, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids = (SEGMENTS.t(), POSITIONS.t()) if packed else (None, None)
    y = layer(x, SequenceLayout(length, 2, CPU, *ids))
    expected = formula(layer, config, x, *ids)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)  # the rotary angles are fp32
    inputs = [x, *layer.parameters()]
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    found, wanted = (torch.autograd.grad((result * weights).sum(), inputs) for result in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_options_change_the_output():
    """Each option acts: with the parameters they share, no two give the same output."""
    x = torch.randn(9, 1, WIDTH, dtype=torch.float64)
    plain, _ = make_attention()
    values = plain.state_dict()
    outputs = {}
    for name, options in OPTIONS.items():
        if "num_kv_heads" not in options:
            layer, _ = make_attention(**options)
            layer.load_state_dict(layer.state_dict() | values)
            outputs[name] = layer(x, SequenceLayout(9, 1, CPU)).detach()
    names = list(outputs)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert not torch.allclose(outputs[first], outputs[second], rtol=1e-3), (first, second)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_documents_equal_separate_ones(name):
    layer, _ = make_attention(**OPTIONS[name])
    x = torch.randn(15, 1, WIDTH, dtype=torch.float64)
    packed = layer(x, SequenceLayout(15, 1, CPU, SEGMENTS[:1].t(), POSITIONS[:1].t()))
    pieces = x[:13].split([3, 4, 6])
    separate = torch.cat([layer(piece, SequenceLayout(len(piece), 1, CPU)) for piece in pieces])
    torch.testing.assert_close(packed[:13], separate, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prompt", [1, 3, 12])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_continues_where_the_prompt_ended(name, prompt):
    layer, config = make_attention(**OPTIONS[name])
    x = torch.randn(20, 2, WIDTH, dtype=torch.float64)
    whole = layer(x, SequenceLayout(20, 2, CPU))
    cache = layer.init_cache(2, torch.float64, CPU)
    pieces = [layer(x[:prompt], SequenceLayout(prompt, 2, CPU), cache)]
    for i in range(prompt, 20):
        pieces.append(layer(x[i : i + 1], SequenceLayout(1, 2, CPU, first_position=i), cache))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-6)
    assert cache.length == 20
    assert cache.kept == (config.window(0) or 20)


def test_the_cache_of_a_window_holds_no_more_than_the_window():
    layer, _ = make_attention(windows=(7,))
    cache = layer.init_cache(1, torch.float64, CPU)
    layer(torch.randn(30, 1, WIDTH, dtype=torch.float64), SequenceLayout(30, 1, CPU), cache)
    for i in range(30, 60):
        layer(torch.randn(1, 1, WIDTH, dtype=torch.float64), SequenceLayout(1, 1, CPU, first_position=i), cache)
    assert cache._keys_SBJP.shape[0] == cache._values_SBJP.shape[0] == 7


def test_buffers_grow_past_their_first_size():
    layer, _ = make_attention(rope_theta=100.0)
    x = torch.randn(150, 1, WIDTH, dtype=torch.float64)
    cache = layer.init_cache(1, torch.float64, CPU)
    pieces = [layer(x[:3], SequenceLayout(3, 1, CPU), cache)]
    for i in range(3, 150):
        pieces.append(layer(x[i : i + 1], SequenceLayout(1, 1, CPU, first_position=i), cache))
    torch.testing.assert_close(torch.cat(pieces), layer(x, SequenceLayout(150, 1, CPU)), rtol=1e-6, atol=1e-6)


def test_each_attention_layer_has_its_own_window():
    config = AttentionConfig(windows=(3, None, 8))
    assert [config.window(i) for i in range(5)] == [3, None, 8, 3, None]
    assert [AttentionConfig().window(i) for i in range(3)] == [None, None, None]
    layers = [make_attention(Place(width=WIDTH, occurrence=i), windows=(3, None))[0] for i in range(3)]
    x = torch.randn(9, 1, WIDTH, dtype=torch.float64)
    first, second, third = (layer(x, SequenceLayout(9, 1, CPU)) for layer in layers)
    assert torch.equal(first, third)
    assert torch.equal(first[:3], third[:3])
    assert not torch.allclose(first[3:], second[3:])


def test_initial_values_and_gates():
    config = AttentionConfig(num_heads=4, head_dim=6, qkv_bias=True, out_bias=True, qk_norm=True, gate="head")
    layer = Attention(TorchLayers(), Place(width=64), config)
    initialise(layer, layer.initialisers(0.02, 0.005), seed=0)
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    for name in ("qkv.bias", "out_proj.bias"):
        assert torch.equal(values[name], torch.zeros_like(values[name]))
    for name in ("q_norm.weight", "k_norm.weight"):
        assert torch.equal(values[name], torch.ones(6))
    assert float(values["gate.bias"].sigmoid().sub(0.25).abs().max()) < 1e-6
    assert float(values["gate.weight"].std()) == pytest.approx(0.02, rel=0.2)
    assert float(values["out_proj.weight"].std()) == pytest.approx(0.005, rel=0.1)
    exempt = {name for name, parameter in layer.named_parameters() if getattr(parameter, "no_weight_decay", False)}
    assert exempt == {name for name, value in values.items() if value.dim() == 1}


def test_layout_refuses_batch_first_ids():
    with pytest.raises(ValueError, match=r"seq_idx: found shape \(2, 9\), expected \(9, 2\)"):
        SequenceLayout(9, 2, CPU, torch.zeros(2, 9, dtype=torch.long))


# ---- against transformers


def their_attention(module_name, config_name, class_name, layer, config, **fields):
    """A class of transformers with our weights, and its output for the same input."""
    import importlib

    module = importlib.import_module(module_name)
    theirs_config = getattr(importlib.import_module(module_name.replace("modeling", "configuration")), config_name)(
        hidden_size=WIDTH,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        attn_implementation="eager",
        **fields,
    )
    theirs = getattr(module, class_name)(theirs_config, layer_idx=0).eval()
    sizes = [config.num_heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
    with torch.no_grad():
        for name, weight in zip("qkv", layer.qkv.weight.split(sizes), strict=True):
            getattr(theirs, f"{name}_proj").weight.copy_(weight)
        theirs.o_proj.weight.copy_(layer.out_proj.weight)
    return module, theirs_config, theirs


def their_output(module, rotary_name, theirs_config, theirs, x_LBD, window=None):
    length = len(x_LBD)
    position_ids = torch.arange(length).unsqueeze(0)
    tables = getattr(module, rotary_name)(theirs_config)(x_LBD.transpose(0, 1), position_ids)
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    mask = torch.zeros(1, 1, length, length).masked_fill(hidden, -torch.inf)
    output, _ = theirs(
        hidden_states=x_LBD.transpose(0, 1), position_embeddings=tables, attention_mask=mask, past_key_values=None
    )
    return output.transpose(0, 1)


def test_matches_qwen3_with_qk_norm():
    layer, config = make_attention(dtype=torch.float32, qk_norm=True, rope_theta=5000.0)
    name = "transformers.models.qwen3.modeling_qwen3"
    module, theirs_config, theirs = their_attention(
        name,
        "Qwen3Config",
        "Qwen3Attention",
        layer,
        config,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    with torch.no_grad():
        theirs.q_norm.weight.copy_(layer.q_norm.weight)
        theirs.k_norm.weight.copy_(layer.k_norm.weight)
        x = torch.randn(11, 2, WIDTH)
        expected = their_output(module, "Qwen3RotaryEmbedding", theirs_config, theirs, x)
        torch.testing.assert_close(layer(x, SequenceLayout(11, 2, CPU)), expected, rtol=1e-4, atol=1e-5)


def test_matches_gemma2_with_soft_cap_and_window():
    layer, config = make_attention(dtype=torch.float32, softcap=1.5, windows=(4,), rope_theta=5000.0)
    name = "transformers.models.gemma2.modeling_gemma2"
    module, theirs_config, theirs = their_attention(
        name,
        "Gemma2Config",
        "Gemma2Attention",
        layer,
        config,
        query_pre_attn_scalar=config.head_dim,
        attn_logit_softcapping=1.5,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    with torch.no_grad():
        x = torch.randn(11, 2, WIDTH)
        expected = their_output(module, "Gemma2RotaryEmbedding", theirs_config, theirs, x, window=4)
        torch.testing.assert_close(layer(x, SequenceLayout(11, 2, CPU)), expected, rtol=1e-4, atol=1e-5)


def test_matches_llama_with_scaled_frequencies():
    scaling = RopeScaling(kind="llama3", factor=4.0, original_max_position_embeddings=32)
    layer, config = make_attention(dtype=torch.float32, rope_theta=50.0, rope_scaling=scaling)
    fields = {key: value for key, value in dataclasses.asdict(scaling).items() if key != "kind"}
    module, theirs_config, theirs = their_attention(
        "transformers.models.llama.modeling_llama",
        "LlamaConfig",
        "LlamaAttention",
        layer,
        config,
        rope_parameters={"rope_type": "llama3", "rope_theta": 50.0, **fields},
    )
    with torch.no_grad():
        x = torch.randn(40, 2, WIDTH)
        expected = their_output(module, "LlamaRotaryEmbedding", theirs_config, theirs, x)
        torch.testing.assert_close(layer(x, SequenceLayout(40, 2, CPU)), expected, rtol=1e-4, atol=1e-5)


# ---- rules and cost


@pytest.mark.parametrize(
    ("changes", "field", "rule"),
    [
        ({"rope_theta": 100.0, "rope_fraction": 0.5}, "rope_fraction", "even number of a head's 6 features"),
        ({"rope_theta": 100.0, "rope_fraction": 1.5}, "rope_fraction", "at most 1"),
        ({"rope_fraction": 0.5}, "rope_fraction", "needs a rotary embedding"),
        ({"rope_scaling": RopeScaling(kind="linear")}, "rope_scaling", "needs a rotary embedding"),
        ({"rope_theta": 9.0, "rope_scaling": RopeScaling(kind="linear", factor=0)}, "rope_scaling.factor", "positive"),
        (
            {"rope_theta": 9.0, "rope_scaling": RopeScaling(kind="llama3", high_freq_factor=1.0)},
            "rope_scaling.high_freq_factor",
            "above low_freq_factor",
        ),
        ({"windows": (4, 0)}, "windows", "positive numbers of tokens"),
        ({"windows": (4, 4, 4)}, "windows", "more entries than the model has attention layers"),
        ({"softcap": 0.0}, "softcap", "positive"),
        ({"clip_gamma": 0.1}, "clip_gamma", "0 or less"),
        ({"clip_gamma": -0.1, "clip_zeta": 0.9}, "clip_zeta", "at least 1"),
        ({"clip_zeta": 1.1}, "clip_zeta", "read with clip_gamma only"),
    ],
)
def test_broken_rules_name_the_field(changes, field, rule):
    config = AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 6} | changes)
    ((found_field, _, found_rule, fix),) = config.violations(WIDTH, 2)
    assert found_field == field
    assert rule in found_rule
    assert fix


def small(**options):
    return AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 4, "qkv_bias": True, "out_bias": True},
        {"rope_theta": 100.0},
        {"rope_theta": 100.0, "qk_norm": True},
        {"qk_norm": True},
        {"gate": "head"},
        {"gate": "feature", "qkv_bias": True, "rope_theta": 100.0},
    ],
)
def test_cost_is_what_the_module_does(options, dtype):
    check_cost(small(**options), 32, length=40, dtype=dtype)


@pytest.mark.parametrize("options", [{"windows": (8,)}, {"windows": (8,), "rope_theta": 100.0, "qk_norm": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cost_of_a_window(options, dtype):
    """Parameters, activation and state bytes are exact. FLOPs count a band as wide as the window; what is executed is
    cut at the beginning and rounded up to tiles.
    """
    config, length = small(**options), 48
    place = Place(width=32)
    module = build(config, place).to(dtype)
    cost = config.cost(place, length, dtype.itemsize)
    assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert cost.activation_bytes_per_token == activation_bytes_per_token(module, 32, length)
    for tokens in (1, 7, 8, 40):
        assert config.cost(place, tokens, dtype.itemsize).state_bytes == state_bytes(module, 32, tokens)
    executed = forward_flops(module, 32, length, 2) / (2 * length)
    full = small(**options | {"windows": ()}).cost(place, length).flops_per_token
    projections = full - 4 * length * 4 * 8
    assert cost.flops_per_token == projections + 4 * 8 * 4 * 8
    assert cost.flops_per_token - 4 * 4 * 4 * 8 <= executed <= cost.flops_per_token + 4 * 4 * 4 * 8
    assert executed < 0.75 * full


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"clip_gamma": -0.1}])
def test_activation_bytes_without_the_fused_kernel(options):
    config, place = small(**options), Place(width=32)
    measured = activation_bytes_per_token(build(config, place), 32, 40)
    assert config.cost(place, 40, 4).activation_bytes_per_token == measured
