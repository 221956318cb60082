"""Rotary embedding against transformers and against what it is for."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pretrain.nn.attention_config import RopeScaling
from pretrain.nn.rope import apply_rotary, rotary_tables


def test_rotary_matches_transformers_llama():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions_LB = torch.tensor([[0, 5], [1, 6], [2, 0]])
    q, k = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 2, 8)
    cos, sin = rotary_tables(positions_LB, 8, 10000.0)
    wide_cos, wide_sin = (torch.cat((t, t), -1).squeeze(2).transpose(0, 1) for t in (cos, sin))
    their_q, their_k = apply_rotary_pos_emb(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), wide_cos, wide_sin)
    torch.testing.assert_close(apply_rotary(q, cos, sin).permute(1, 2, 0, 3), their_q)
    torch.testing.assert_close(apply_rotary(k, cos, sin).permute(1, 2, 0, 3), their_k)


def test_partial_rotary_matches_transformers_phi():
    """Phi rotates the first features of a head and passes on the others."""
    from transformers.models.phi.configuration_phi import PhiConfig
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding, apply_rotary_pos_emb

    fields = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = PhiConfig(hidden_size=32, num_attention_heads=4, rope_parameters=fields)
    positions_LB = torch.tensor([[0, 5], [1, 6], [2, 0]])
    x = torch.randn(3, 2, 4, 8)
    their_cos, their_sin = PhiRotaryEmbedding(config)(x, positions_LB.t())
    turned, rest = x.permute(1, 2, 0, 3).split([4, 4], dim=-1)
    theirs, _ = apply_rotary_pos_emb(turned, turned, their_cos, their_sin)
    found = apply_rotary(x, *rotary_tables(positions_LB, 4, 500.0)).permute(1, 2, 0, 3)
    torch.testing.assert_close(found, torch.cat((theirs, rest), -1))


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=4.0),
        RopeScaling(kind="llama3"),
        RopeScaling(
            kind="llama3",
            factor=32.0,
            low_freq_factor=1.5,
            high_freq_factor=6.0,
            original_max_position_embeddings=1024,
        ),
    ],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_scaled_frequencies_match_transformers(scaling, theta):
    fields = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        fields |= {name: getattr(scaling, name) for name in names}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=fields)
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config)
    assert factor == 1.0
    positions = 250 * torch.arange(5).unsqueeze(1)
    cos, sin = rotary_tables(positions, 128, theta, scaling)
    angles = (positions * frequencies).view(5, 1, 1, 64)
    # Angles of up to 1000 in fp32 have errors of 1e-4.
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=2e-4)
    assert not torch.allclose(cos, rotary_tables(positions, 128, theta)[0], atol=1e-2)


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(8, dtype=torch.float32), torch.randn(8)

    def score(query_position, key_position):
        cos, sin = rotary_tables(torch.tensor([[query_position], [key_position]]), 8, 100.0)
        turned = apply_rotary(torch.stack((q, k)).view(2, 1, 1, 8), cos, sin).view(2, 8)
        return turned[0] @ turned[1]

    torch.testing.assert_close(score(3, 1), score(43, 41), rtol=1e-4, atol=1e-4)


def test_half_precision_is_turned_in_full_precision():
    cos, sin = rotary_tables(torch.arange(6).unsqueeze(1), 4, 100.0)
    x = torch.randn(6, 1, 2, 8).bfloat16()
    assert apply_rotary(x, cos, sin).dtype == torch.bfloat16
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(x.float(), cos, sin).bfloat16())
