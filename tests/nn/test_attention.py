"""Attention against the written-out formula in float64, and rotary embedding against transformers."""

import math

import pytest
import torch

from pretrain.nn.attention import Attention
from pretrain.nn.attention_config import AttentionConfig
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.rope import apply_rotary, rotary_tables
from pretrain.parallel.layers import TorchLayers

CPU = torch.device("cpu")


def make_attention(num_heads=4, num_kv_heads=2, head_dim=6, width=10, rope_theta=None):
    config = AttentionConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope_theta=rope_theta)
    torch.manual_seed(0)
    layer = Attention(TorchLayers(), width, config).double()
    torch.nn.init.normal_(layer.qkv.weight, std=0.5)
    return layer


def formula(layer, x_LBD, seq_idx_LB=None, position_ids_LB=None):
    """softmax(q k / sqrt(P)) v, one query at a time, with plain loops."""
    length, batch_size, _ = x_LBD.shape
    heads, kv_heads, head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    wq, wk, wv = layer.qkv.weight.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    out = torch.zeros(length, batch_size, heads * head_dim, dtype=x_LBD.dtype)

    def turned(vector, position):
        if layer.rope_theta is None:
            return vector
        half = head_dim // 2
        frequencies = layer.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        pairs = torch.complex(vector[:half], vector[half:]) * torch.exp(1j * position * frequencies)
        return torch.cat((pairs.real, pairs.imag))

    for b in range(batch_size):
        for i in range(length):
            positions = range(length) if position_ids_LB is None else position_ids_LB[:, b].tolist()
            allowed = [j for j in range(i + 1) if seq_idx_LB is None or seq_idx_LB[j, b] == seq_idx_LB[i, b]]
            for h in range(heads):
                kv = h // (heads // kv_heads)
                query = turned(wq[h * head_dim : (h + 1) * head_dim] @ x_LBD[i, b], positions[i])
                keys = [turned(wk[kv * head_dim : (kv + 1) * head_dim] @ x_LBD[j, b], positions[j]) for j in allowed]
                values = torch.stack([wv[kv * head_dim : (kv + 1) * head_dim] @ x_LBD[j, b] for j in allowed])
                weights = (torch.stack(keys) @ query / math.sqrt(head_dim)).softmax(0)
                out[i, b, h * head_dim : (h + 1) * head_dim] = weights @ values
    return out @ layer.out_proj.weight.t()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rope_theta", [None, 100.0])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_matches_the_formula(num_kv_heads, rope_theta, packed):
    layer = make_attention(num_kv_heads=num_kv_heads, rope_theta=rope_theta)
    x = torch.randn(9, 2, 10, dtype=torch.float64)
    segments = positions = None
    if packed:
        segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 0, 1, 1, 1, 1, 2, 2, 2]]).t()
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3, 0, 1, 2]]).t()
    y = layer(x, SequenceLayout(9, 2, CPU, segments, positions))
    torch.testing.assert_close(y, formula(layer, x, segments, positions), rtol=1e-6, atol=1e-6)


def test_rotary_matches_transformers_llama():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions_LB = torch.tensor([[0, 5], [1, 6], [2, 0]])
    q, k = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 2, 8)
    cos, sin = rotary_tables(positions_LB, 8, 10000.0)
    wide_cos, wide_sin = (torch.cat((t, t), -1).squeeze(2).transpose(0, 1) for t in (cos, sin))
    their_q, their_k = apply_rotary_pos_emb(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), wide_cos, wide_sin)
    torch.testing.assert_close(apply_rotary(q, cos, sin).permute(1, 2, 0, 3), their_q)
    torch.testing.assert_close(apply_rotary(k, cos, sin).permute(1, 2, 0, 3), their_k)


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(8, dtype=torch.float32), torch.randn(8)

    def score(query_position, key_position):
        cos, sin = rotary_tables(torch.tensor([[query_position], [key_position]]), 8, 100.0)
        turned = apply_rotary(torch.stack((q, k)).view(2, 1, 1, 8), cos, sin).view(2, 8)
        return turned[0] @ turned[1]

    torch.testing.assert_close(score(3, 1), score(43, 41), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope_theta", [None, 100.0])
def test_cache_continues_where_the_prompt_ended(rope_theta):
    layer = make_attention(rope_theta=rope_theta)
    x = torch.randn(150, 2, 10, dtype=torch.float64)
    whole = layer(x, SequenceLayout(150, 2, CPU))
    cache = layer.init_cache(2, torch.float64, CPU)
    pieces = [layer(x[:3], SequenceLayout(3, 2, CPU), cache)]
    for i in range(3, 150):  # passes the first buffer size and one doubling
        pieces.append(layer(x[i : i + 1], SequenceLayout(1, 2, CPU, first_position=i), cache))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=1e-6)


def test_layout_refuses_batch_first_ids():
    with pytest.raises(ValueError, match=r"seq_idx: found shape \(2, 9\), expected \(9, 2\)"):
        SequenceLayout(9, 2, CPU, torch.zeros(2, 9, dtype=torch.long))
