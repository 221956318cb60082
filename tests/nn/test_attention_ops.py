"""Attention kernels: the blocked way against torch in float64, the choice of a way, and what flash kernels are told."""

import importlib.metadata
import itertools
import math
import sys
import types

import pytest
import torch
from torch.autograd import gradcheck

from pretrain.ops import attention, attention_flash, attention_tiles
from pretrain.ops.attention import attend_to_all, causal_attention, choose, describe_ways
from pretrain.ops.attention_blocked import blocked_attention
from pretrain.ops.attention_tiles import Documents
from pretrain.ops.softcap import soft_cap

CPU = torch.device("cpu")
LENGTH, BATCH = 50, 2
SEGMENTS = torch.tensor(
    [
        [0] * 3 + [1] + [2] * 4 + [3] * 17 + [4] * 9 + [5] * 2 + [-1] * 14,
        [0] * 30 + [1] * 20,
    ]
).t()


def reference(q, k, v, segments, window, softcap, clip):
    """The whole matrix, by torch's own operations; zero at padding."""
    length, _, heads, head_dim = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("lbhp,sbhp->bhls", q, k) / math.sqrt(head_dim)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    if segments is not None:
        visible = visible & (segments.t().unsqueeze(2) == segments.t().unsqueeze(1)).unsqueeze(1)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    if clip is not None:
        weights = ((clip[1] - clip[0]) * weights + clip[0]).clamp(0, 1)
    y = torch.einsum("bhls,sbhp->lbhp", weights, v)
    return y if segments is None else y * (segments >= 0).unsqueeze(-1).unsqueeze(-1)


def random_heads(heads=(4, 2, 2), dtype=torch.float64, length=LENGTH, batch=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, batch, n, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in heads
    ]


@pytest.mark.parametrize("queries", [8, 128])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("clip", [None, (-0.05, 1.1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blocked_attention_and_its_gradients(softcap, clip, segments, queries, monkeypatch):
    monkeypatch.setattr(attention_tiles, "QUERIES", queries)
    for window, heads in itertools.product((None, 1, 3, 8, 11, 20), ((4, 2, 2), (2, 2, 2), (3, 1, 1))):
        q, k, v = random_heads(heads)
        y = blocked_attention(q, k, v, Documents(LENGTH, BATCH, CPU, segments), window, softcap, clip)
        expected = reference(q, k, v, segments, window, softcap, clip)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        weights = torch.randn(y.shape, dtype=y.dtype)
        found, wanted = (torch.autograd.grad((r * weights).sum(), (q, k, v)) for r in (y, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_gradients_by_finite_differences(monkeypatch):
    monkeypatch.setattr(attention_tiles, "QUERIES", 4)
    documents = Documents(11, 1, CPU, torch.tensor([0] * 8 + [1] * 2 + [-1]).unsqueeze(1))
    tensors = random_heads((2, 1, 1), length=11, batch=1)
    assert gradcheck(lambda q, k, v: blocked_attention(q, k, v, documents, 3, 1.5, (-0.02, 1.0)), tensors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_precision_is_that_of_the_inputs_rounded_once(dtype, tolerance):
    """Arithmetic is fp32: bf16 results differ from the exact ones by one rounding."""
    q, k, v = random_heads(dtype=dtype)
    y = causal_attention(q, k, v, Documents(LENGTH, BATCH, CPU, SEGMENTS), 9)
    assert y.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference(*exact, SEGMENTS, 9, None, None)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(y.sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.sum(), exact)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2 * tolerance, atol=2 * tolerance)


def test_nothing_as_large_as_the_matrix_is_kept_or_computed(monkeypatch):
    """Tiles cover what is visible and little else, and the backward pass keeps only queries, keys and values."""
    length = 4096
    whole = Documents(length, 1, CPU)
    area = sum((tile.stop - tile.start) * (tile.stop - tile.first) for tile in whole.tiles(64))
    assert area < 1.1 * length * (64 + attention_tiles.QUERIES)
    lengths = [5, 300, 20, 40, 1000, 3, 3, 700, 2025]
    segments = torch.cat([torch.full((n, 1), i) for i, n in enumerate(lengths)])
    area = sum((t.stop - t.start) * (t.stop - t.first) for t in Documents(length, 1, CPU, segments).tiles(None))
    assert area < 1.1 * sum(n * (n + attention_tiles.QUERIES) / 2 for n in lengths)

    kept = []
    q, k, v = random_heads((1, 1, 1), torch.float32, length=1024, batch=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        blocked_attention(q, k, v, Documents(1024, 1, CPU), 500)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 3 * q.nbytes


def test_runs_are_what_lies_between_changes():
    assert Documents(9, 1, CPU).runs is None
    ids = torch.tensor([[3, 3, 5, 5, 5, 3, -1, -1, -1], [0] * 9, [-1] * 9]).t()
    documents = Documents(9, 3, CPU, ids)
    assert documents.runs == [[(0, 2), (2, 5), (5, 6)], [(0, 9)], []]
    assert documents.lengths == [2, 3, 1, 9]
    assert documents.cu_seqlens.tolist() == [0, 2, 5, 6, 15]
    rows, places = documents.token_index_T % 3, documents.token_index_T // 3
    assert rows.tolist() == [0] * 6 + [1] * 9
    assert places.tolist() == [*range(6), *range(9)]
    assert Documents(9, 1, CPU, torch.zeros(9, 1, dtype=torch.long)).runs is None


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("clip", [None, (-0.05, 1.1)])
def test_one_query_against_a_cache_is_the_last_of_a_whole_row(softcap, clip):
    q, k, v = random_heads()
    y = attend_to_all(q[-1:], k, v, softcap, clip)
    expected = reference(q, k, v, None, None, softcap, clip)[-1:]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_soft_cap_and_its_gradient():
    x = (20 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_()
    torch.testing.assert_close(soft_cap(x, 7.0), 7.0 * torch.tanh(x / 7.0))
    assert gradcheck(lambda x: soft_cap(x, 7.0), [x])


# ---- the choice of a way

WHOLE = Documents(LENGTH, BATCH, CPU)
PACKED = Documents(LENGTH, BATCH, CPU, SEGMENTS)


@pytest.fixture
def kernels(monkeypatch):
    """Which CUDA kernels are there."""

    def set_kernels(flash, varlen):
        monkeypatch.setattr(attention, "flash_attn_fault", lambda: None if flash else "not installed")
        monkeypatch.setattr(attention, "torch_varlen_fault", lambda: None if varlen else "none")

    return set_kernels


def test_the_way_follows_from_device_precision_and_options(kernels):
    half, clip = torch.bfloat16, (-0.1, 1.0)
    kernels(flash=True, varlen=True)
    assert choose("cpu", half, 64, WHOLE, None, None, None) == "sdpa"
    assert choose("cuda", half, 64, WHOLE, None, None, None) == "sdpa"
    assert choose("cpu", half, 64, PACKED, None, None, None) == "blocked"
    assert choose("cpu", half, 64, WHOLE, 9, None, None) == "blocked"
    assert choose("cuda", half, 64, PACKED, None, None, None) == "flash_attn"
    assert choose("cuda", half, 64, WHOLE, 9, 2.0, None) == "flash_attn"
    assert choose("cuda", half, 64, PACKED, None, None, clip) == "blocked"
    assert choose("cuda", torch.float32, 64, PACKED, None, None, None) == "blocked"
    assert choose("cuda", half, 512, PACKED, None, None, None) == "blocked"
    kernels(flash=False, varlen=True)
    assert choose("cuda", half, 64, PACKED, 9, None, None) == "torch_varlen"
    assert choose("cuda", half, 64, PACKED, 9, 2.0, None) == "blocked"
    kernels(flash=False, varlen=False)
    assert choose("cuda", half, 64, PACKED, 9, None, None) == "blocked"


def test_a_window_as_long_as_the_row_is_none(monkeypatch):
    q, k, v = random_heads()
    monkeypatch.setattr(attention, "blocked_attention", None)
    assert torch.equal(causal_attention(q, k, v, WHOLE, window=LENGTH), causal_attention(q, k, v, WHOLE))


def test_ways_are_described():
    ways = describe_ways()
    assert ways["sdpa"] == ways["blocked"] == "available"
    if not torch.cuda.is_available():
        assert ways["torch_varlen"] == "no CUDA device"
        assert ways["flash_attn"] != "available"


# ---- flash kernels, by functions with their documented signatures


def documents_of(cu_seqlens, *tensors):
    return [[x[a:b] for x in tensors] for a, b in itertools.pairwise(cu_seqlens.tolist())]


def plain(q_THP, k_TJP, v_TJP, left, softcap, scale):
    """Causal attention of one document; ``left``: keys seen before the query, -1 for all."""
    assert scale == q_THP.shape[-1] ** -0.5
    window = None if left < 0 else left + 1
    return reference(*(x.unsqueeze(1) for x in (q_THP, k_TJP, v_TJP)), None, window, softcap or None, None).squeeze(1)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The signature of flash-attention 2.8, and what its documentation says that it computes."""
    assert causal
    assert dropout_p == 0.0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert window_size[1] in (-1, 0)
    lengths = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).tolist()
    assert isinstance(max_seqlen_q, int)
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    assert sum(lengths) == len(q)
    pieces = documents_of(cu_seqlens_q, q, k, v)
    return torch.cat([plain(*piece, window_size[0], softcap, softmax_scale) for piece in pieces])


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """The signature of torch 2.13, and what its documentation says that it computes."""
    assert window_size[1] == 0, "not causal"
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert max_q == max_k == int((cu_seq_q[1:] - cu_seq_q[:-1]).max())
    return torch.cat(
        [plain(*piece, window_size[0], None, scale) for piece in documents_of(cu_seq_q, query, key, value)]
    )


@pytest.fixture
def fake_flash(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    versions = {"flash_attn": "2.8.3"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    for function in (attention_flash._flash_attn, attention_flash.flash_attn_fault):
        function.cache_clear()
    yield versions
    monkeypatch.undo()
    for function in (attention_flash._flash_attn, attention_flash.flash_attn_fault):
        function.cache_clear()


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flash_attention_is_asked_for_the_same(fake_flash, segments, window, softcap):
    assert attention_flash.flash_attn_fault() is None
    q, k, v = random_heads()
    documents = Documents(LENGTH, BATCH, CPU, segments)
    y = attention_flash.with_kernel(attention_flash.flash_attn_kernel, q, k, v, documents, window, softcap)
    expected = reference(q, k, v, segments, window, softcap, None)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    found, wanted = (torch.autograd.grad(r.square().sum(), (q, k, v)) for r in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_torchs_kernel_is_asked_for_the_same(monkeypatch, segments, window):
    import inspect

    theirs = inspect.signature(attention_flash._torch_varlen())
    assert list(theirs.parameters) == list(inspect.signature(varlen_attn).parameters)
    monkeypatch.setattr(attention_flash, "_torch_varlen", lambda: varlen_attn)
    for batch in (1, 2):
        q, k, v = random_heads(batch=batch)
        ids = None if segments is None else segments[:, :batch]
        documents = Documents(LENGTH, batch, CPU, ids)
        y = attention_flash.with_kernel(attention_flash.torch_varlen_kernel, q, k, v, documents, window, None)
        torch.testing.assert_close(y, reference(q, k, v, ids, window, None, None), rtol=1e-10, atol=1e-10)


def test_faults_of_flash_attention_are_named(fake_flash):
    fake_flash["flash_attn"] = "2.5.9"
    assert attention_flash.flash_attn_fault() == "version 2.5.9 is too old, 2.6 or newer is needed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_on_the_gpu_agree_with_the_blocked_way(packed, softcap, window):
    """bf16 against float32 arithmetic on the same bf16 inputs: within two roundings of the largest value."""
    length, device = 2048, torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(length, 2, n, 64, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for n in (8, 2, 2)
    ]
    ids = torch.tensor([[0] * 1500 + [1] * 400 + [-1] * 148, [0] * 10 + [1] * 2038]).t().to(device)
    documents = Documents(length, 2, device, ids if packed else None)
    weights = torch.randn(length, 2, 8, 64, generator=generator).to(device, torch.bfloat16)
    results = []
    for function in (causal_attention, blocked_attention):
        y = function(*tensors, documents, window, softcap)
        results.append([y, *torch.autograd.grad((y * weights).sum(), tensors)])
    for found, expected in zip(*results, strict=True):
        scale = float(expected.float().abs().max())
        torch.testing.assert_close(found.float(), expected.float(), rtol=2**-6, atol=2**-7 * scale)
