"""Choice of kernels, and the adapters to other libraries against stand-ins with the documented signatures.

The stand-ins compute by plain recurrences, batch-first, and check what the real kernels demand of shapes, strides and
types, so a wrong argument, order or layout fails here. The real kernels are compared on a GPU, where there is one.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
import types
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pretrain.ops import backends

L, B, H, P, G, N, INNER, KERNEL = 21, 2, 4, 3, 2, 5, 16, 4
DOCUMENTS = torch.tensor([[0] * 6 + [1] * 1 + [0] * 9 + [-1] * 5, [3] * 21]).t()


# Stand-ins.


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """As mamba_ssm/ops/triton/ssd_combined.py: x (batch, seqlen, nheads, headdim), dt (batch, seqlen, nheads),
    A (nheads), B and C (batch, seqlen, ngroups, dstate), initial_states (batch, nheads, headdim, dstate), seq_idx
    (batch, seqlen). An initial state belongs to document 0.
    """
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    assert dt.shape == (batch, length, heads)
    assert A.shape == (heads,)
    assert C.shape == B.shape == (batch, length, groups, states)
    assert x.stride(-1) == B.stride(-1) == C.stride(-1) == 1
    assert 16 <= chunk_size <= 256
    assert not chunk_size & (chunk_size - 1)
    assert z is None
    assert dt_bias is None
    assert A.dtype == torch.float32
    if seq_idx is not None:
        assert seq_idx.shape == (batch, length)
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
        assert not (seq_idx[:, 1:] < seq_idx[:, :-1]).any()  # the kernel compares numbers of distant positions
    h = x.new_zeros(batch, heads, head_dim, states) if initial_states is None else initial_states
    if initial_states is not None:
        assert h.shape == (batch, heads, head_dim, states)
        assert seq_idx is None or not seq_idx[:, 0].any()
    outputs = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        if seq_idx is not None and t:
            decay = decay * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        keys, queries = (m[:, t].repeat_interleave(heads // groups, dim=1)[:, :, None] for m in (B, C))
        h = h * decay + (dt[:, t, :, None] * x[:, t])[..., None] * keys
        outputs.append((h * queries).sum(-1) + (0 if D is None else D[:, None] * x[:, t]))
    out = torch.stack(outputs, 1).to(x.dtype)
    return (out, h) if return_final_states else out


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    """As fla/ops/simple_gla/chunk.py: q, k [B, T, H, K], v [B, T, H, V], g [B, T, H], states [N, H, K, V]; with
    cu_seqlens a batch of one, and one state for each sequence.
    """
    batch, length, heads, width = q.shape
    assert k.shape == q.shape
    assert v.shape[:3] == g.shape == (batch, length, heads)
    assert q.dtype == k.dtype == v.dtype
    if cu_seqlens is None:
        sequences = [(b, 0, length) for b in range(batch)]
    else:
        assert batch == 1
        assert cu_seqlens.dtype == torch.int64
        sequences = [(0, a, b) for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
        assert sequences[-1][2] == length
    assert initial_state is None or initial_state.shape == (len(sequences), heads, width, v.shape[-1])
    scale = width**-0.5 if scale is None else scale
    rows, states = {}, []
    for number, (b, start, stop) in enumerate(sequences):
        h = v.new_zeros(heads, width, v.shape[-1]) if initial_state is None else initial_state[number]
        for t in range(start, stop):
            h = h * g[b, t].exp()[:, None, None] + k[b, t][..., None] * v[b, t][:, None]
            rows[b, t] = scale * (q[b, t][..., None] * h).sum(1)
        states.append(h)
    out = torch.stack([torch.stack([rows[b, t] for t in range(length)]) for b in range(batch)])
    return out, torch.stack(states) if output_final_state else None


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):  # fmt: skip
    """As mamba_ssm/ops/selective_scan_interface.py: u, delta, z (B D L), A (D N), B, C (B N L), D and delta_bias (D)
    in fp32; last_state (B D N).
    """
    batch, inner, length = u.shape
    assert delta.shape == u.shape
    assert A.shape[0] == inner
    assert B.shape == C.shape == (batch, A.shape[1], length)
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
    assert u.dtype == delta.dtype == B.dtype == C.dtype == z.dtype
    assert u.stride(-1) == B.stride(-1) == 1
    step = delta + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    h = u.new_zeros(batch, *A.shape)
    outputs = []
    for t in range(length):
        h = h * torch.exp(step[:, :, t, None] * A) + (step * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    out = (torch.stack(outputs, -1) + D[:, None] * u) * F.silu(z)
    return (out, h.detach()) if return_last_state else out


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    """As causal_conv1d/causal_conv1d_interface.py: x (batch, dim, seqlen), weight (dim, width), seq_idx
    (batch, seqlen), which asks for channels last with strides in multiples of 8.
    """
    batch, channels, length = x.shape
    assert weight.shape[0] == channels
    assert 2 <= weight.shape[1] <= 4
    assert x.stride(1) == 1
    assert x.stride(0) % 8 == x.stride(2) % 8 == x.storage_offset() % 8 == channels % 8 == 0
    assert activation == "silu"
    outputs = []
    for t in range(length):
        pre = torch.zeros_like(x[:, :, 0]) if bias is None else bias.expand(batch, channels)
        for s in range(min(weight.shape[1], t + 1)):
            tap = weight[:, -1 - s] * x[:, :, t - s]
            if seq_idx is not None:
                assert seq_idx.shape == (batch, length)
                assert seq_idx.dtype == torch.int32
                assert not (seq_idx < 0).any()  # the kernel gives zeros there
                tap = tap * (seq_idx[:, t] == seq_idx[:, t - s])[:, None]
            pre = pre + tap
        outputs.append(F.silu(pre))
    return torch.stack(outputs, -1)


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """As mamba_ssm/ops/triton/layernorm_gated.py."""
    assert weight.shape == x.shape[-1:]
    assert bias is None
    if not norm_before_gate:
        x = x * F.silu(z)
    parts = x.unflatten(-1, (-1, group_size))
    out = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    return out * F.silu(z) if norm_before_gate else out


LIBRARIES = {
    "mamba_ssm.ops.triton.ssd_combined": mamba_chunk_scan_combined,
    "mamba_ssm.ops.selective_scan_interface": selective_scan_fn,
    "mamba_ssm.ops.triton.layernorm_gated": rmsnorm_fn,
    "causal_conv1d": causal_conv1d_fn,
    "fla.ops.simple_gla": chunk_simple_gla,
}


@pytest.fixture
def install(monkeypatch):
    """Install stand-ins of the named libraries (all by default), count their calls, and take tensors for CUDA's."""
    calls: list[str] = []

    def add(module: str, function) -> None:
        def counted(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        counted.__signature__ = inspect.signature(function)
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules or not getattr(sys.modules[name], "stand_in", False):
                made = types.ModuleType(name)
                made.stand_in, made.__path__ = True, []
                made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
                monkeypatch.setitem(sys.modules, name, made)
        setattr(sys.modules[module], function.__name__, counted)

    def install(*packages: str, **replaced) -> list[str]:
        for module, function in LIBRARIES.items():
            if not packages or module.split(".")[0] in packages:
                add(module, replaced.get(function.__name__, function))
        return calls

    monkeypatch.setattr(backends, "_on_accelerator", lambda tensor: True)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    caches = (backends._choose, backends._warn_once, backends._refuse_on_cpu, backends._refuse_unknown)
    for cached in caches:
        cached.cache_clear()
    yield install
    for cached in caches:
        cached.cache_clear()


# Calls of each operation: (function of `backends`, inputs that ask for gradients, fixed keywords).


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def packed_slices(*sizes: int, offset: int = 8) -> list[Tensor]:
    """Slices of one projection, as mixers pass them."""
    whole = rand(L, B, offset + sum(sizes))
    return [t.requires_grad_() for t in whole[..., offset:].split(sizes, dim=-1)]


def ssd_inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, keys, queries = packed_slices(H * P, G * N, G * N)
    return {
        "x_LBHP": x.unflatten(-1, (H, P)).detach().requires_grad_(),
        "dt_LBH": torch.rand(L, B, H).requires_grad_(),
        "A_H": (-torch.rand(H) - 0.1).requires_grad_(),
        "B_LBGN": keys.unflatten(-1, (G, N)).detach().requires_grad_(),
        "C_LBGN": queries.unflatten(-1, (G, N)).detach().requires_grad_(),
        "D_H": rand(H).requires_grad_(),
    }


def scan_inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, z = packed_slices(INNER, INNER)
    keys, queries = packed_slices(N, N)
    return {
        "x_LBI": x,
        "dt_LBI": rand(L, B, INNER).requires_grad_(),
        "A_IN": (-torch.rand(INNER, N) - 0.1).requires_grad_(),
        "B_LBN": keys,
        "C_LBN": queries,
        "D_I": rand(INNER).requires_grad_(),
        "z_LBI": z,
        "dt_bias_I": rand(INNER).requires_grad_(),
    }


def conv_inputs(offset: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(0)
    (x,) = packed_slices(INNER, offset=offset)
    return {"x_LBC": x, "weight_CK": rand(INNER, KERNEL).requires_grad_(), "bias_C": rand(INNER).requires_grad_()}


def norm_inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    (z,) = packed_slices(INNER)
    return {"y": rand(L, B, INNER).requires_grad_(), "z": z, "weight_D": rand(INNER).requires_grad_()}


def evaluate(function, inputs: dict[str, Tensor], state_gradient: bool = False, **fixed) -> list[Tensor]:
    """Output, final state if there is one, and gradients of all inputs."""
    result = function(**inputs, **fixed)
    y, state = result if isinstance(result, tuple) else (result, None)
    loss = (y * torch.sin(torch.arange(y.numel(), device=y.device)).view(y.shape)).sum()
    if state_gradient:
        loss = loss + state.square().sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return [y.detach(), *([] if state is None else [state.detach()]), *gradients]


def compare(monkeypatch, function, make_inputs, tolerance: float = 2e-5, **kwargs) -> None:
    """The chosen kernel against torch's, relative to the largest element of each tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = evaluate(function, make_inputs(), **kwargs)
    monkeypatch.setenv(backends.VARIABLE, "torch")
    want = evaluate(function, make_inputs(), **kwargs)
    monkeypatch.delenv(backends.VARIABLE)
    if kwargs.get("need_state") is False:
        del want[1]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("library", ["mamba_ssm", "fla"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("need_state", [False, True])
def test_ssd_adapters(install, monkeypatch, library, packed, need_state):
    calls = install(library)
    fixed = {"seq_idx_LB": DOCUMENTS if packed else None, "chunk_size": 8, "need_state": need_state}
    compare(monkeypatch, backends.ssd, ssd_inputs, state_gradient=need_state, **fixed)
    assert set(calls) == {"mamba_chunk_scan_combined" if library == "mamba_ssm" else "chunk_simple_gla"}


@pytest.mark.parametrize(("library", "packed"), [("mamba_ssm", False), ("mamba_ssm", True), ("fla", False)])
def test_ssd_adapters_with_an_initial_state(install, monkeypatch, library, packed):
    calls = install(library)

    def inputs() -> dict[str, Tensor]:
        return ssd_inputs() | {"initial_state_BHPN": rand(B, H, P, N).requires_grad_()}

    compare(
        monkeypatch, backends.ssd, inputs, state_gradient=True, seq_idx_LB=DOCUMENTS if packed else None, chunk_size=300
    )
    assert calls


def test_selective_scan_adapter(install, monkeypatch):
    calls = install("mamba_ssm")
    compare(monkeypatch, backends.selective_scan, scan_inputs, dt_softplus=True, need_state=False)
    assert calls == ["selective_scan_fn"]
    inputs = {name: t.detach() for name, t in scan_inputs().items()}
    with torch.no_grad():
        y, state = backends.selective_scan(**inputs, dt_softplus=True, need_state=True)
    assert calls == ["selective_scan_fn"] * 2
    monkeypatch.setenv(backends.VARIABLE, "torch")
    want, want_state = backends.selective_scan(**inputs, dt_softplus=True)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("offset", [8, 3])
def test_causal_conv_adapter(install, monkeypatch, packed, offset):
    calls = install("causal_conv1d")
    seq_idx = DOCUMENTS if packed else None
    compare(monkeypatch, backends.causal_conv, lambda: conv_inputs(offset), seq_idx_LB=seq_idx)
    assert calls == ["causal_conv1d_fn"]


def test_gated_norm_adapter(install, monkeypatch):
    calls = install("mamba_ssm")
    compare(monkeypatch, backends.gated_rms_norm, norm_inputs, num_groups=4, eps=1e-3)
    assert calls == ["rmsnorm_fn"]


@pytest.mark.parametrize(
    ("function", "inputs", "fixed", "reason"),
    [
        ("selective_scan", scan_inputs, {"seq_idx_LB": DOCUMENTS}, "document boundaries"),
        ("selective_scan", scan_inputs, {"initial_state_BIN": torch.ones(B, INNER, N)}, "no initial state"),
        ("selective_scan", scan_inputs, {}, "final state carries no gradient"),
        ("causal_conv", conv_inputs, {"initial_state_KBC": torch.ones(KERNEL - 1, B, INNER)}, "initial states"),
        ("causal_conv", lambda: {n: t[..., :15] if n == "x_LBC" else t[:15] for n, t in conv_inputs().items()}, {},
         "multiple of 8 channels, not 15"),
    ],
)  # fmt: skip
def test_what_a_kernel_cannot_do_falls_back_with_one_warning(install, function, inputs, fixed, reason):
    calls = install()
    with pytest.warns(UserWarning, match=rf"{function}: torch computes some calls instead of .*{reason}"):
        first = getattr(backends, function)(**inputs(), **fixed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = getattr(backends, function)(**inputs(), **fixed)
    assert not calls
    first, second = ((r[0] if isinstance(r, tuple) else r) for r in (first, second))
    assert torch.equal(first, second)


def test_float64_is_left_to_torch(install):
    calls = install()
    with pytest.warns(UserWarning, match="float64"):
        y, _ = backends.ssd(**{name: t.double() for name, t in ssd_inputs().items()})
    assert y.dtype == torch.float64
    assert not calls


def chosen() -> dict[str, str]:
    return {choice.operation: choice.backend for choice in backends.choices()}


def test_automatic_choice_takes_what_is_installed(install):
    assert set(chosen().values()) == {"torch"}
    assert "not installed" in backends.choices()[0].reason
    backends._choose.cache_clear()
    install("fla", "causal_conv1d")
    assert chosen() == {
        "ssd": "fla", "selective_scan": "torch", "causal_conv": "mamba_ssm", "gated_rms_norm": "torch"
    }  # fmt: skip
    backends._choose.cache_clear()
    install()
    assert chosen()["ssd"] == "mamba_ssm"


def test_a_choice_can_be_forced(install, monkeypatch):
    calls = install()
    monkeypatch.setenv(backends.VARIABLE, "torch")
    backends.ssd(**ssd_inputs())
    assert not calls
    monkeypatch.setenv(backends.VARIABLE, "fla")
    assert chosen() == {
        "ssd": "fla", "selective_scan": "torch", "causal_conv": "torch", "gated_rms_norm": "torch"
    }  # fmt: skip
    backends.ssd(**ssd_inputs())
    assert calls == ["chunk_simple_gla"]


def test_impossible_choices_are_refused_with_the_fix(install, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "mamba_ssm")
    with pytest.raises(ValueError, match=r"ssd: mamba-ssm is not installed; pip install mamba-ssm, or set"):
        backends.ssd(**ssd_inputs())
    monkeypatch.setenv(backends.VARIABLE, "cutlass")
    with pytest.raises(ValueError, match=r"'cutlass' is not known; set it to one of auto, torch, mamba_ssm, fla"):
        backends.causal_conv(**conv_inputs())
    install()
    monkeypatch.setattr(backends, "_on_accelerator", lambda tensor: False)
    monkeypatch.setenv(backends.VARIABLE, "mamba_ssm")
    with pytest.raises(ValueError, match=r"work on CUDA tensors.*set PRETRAIN_KERNELS to auto or torch"):
        backends.gated_rms_norm(**norm_inputs())


def test_a_library_that_changed_or_does_not_load_is_not_used(install, monkeypatch):
    def other(x, dt, A, B, C, chunk_size):
        raise AssertionError

    other.__name__ = "mamba_chunk_scan_combined"
    install("mamba_ssm", mamba_chunk_scan_combined=other)
    reasons = {choice.operation: choice.reason for choice in backends.choices()}
    assert "mamba_chunk_scan_combined lacks the arguments D, initial_states" in reasons["ssd"]
    monkeypatch.delattr(sys.modules["mamba_ssm.ops.triton.layernorm_gated"], "rmsnorm_fn")
    backends._choose.cache_clear()
    reasons = {choice.operation: choice.reason for choice in backends.choices()}
    assert "does not import: AttributeError" in reasons["gated_rms_norm"]


def test_cpu_tensors_are_torchs_whatever_is_installed(install, monkeypatch):
    calls = install()
    monkeypatch.setattr(backends, "_on_accelerator", lambda tensor: tensor.device.type == "cuda")
    backends.ssd(**ssd_inputs())
    backends.causal_conv(**conv_inputs())
    assert not calls


# On a GPU: the real kernels against the recurrence in float64.

GPU_CASES = [
    ("ssd", "mamba_ssm", False), ("ssd", "mamba_ssm", True), ("ssd", "fla", False), ("ssd", "fla", True),
    ("selective_scan", "mamba_ssm", False), ("causal_conv", "mamba_ssm", False), ("causal_conv", "mamba_ssm", True),
    ("gated_rms_norm", "mamba_ssm", False),
]  # fmt: skip
# Largest difference relative to the largest element: (outputs, gradients). fp32 products may be computed in tf32.
GPU_TOLERANCES = {torch.float32: (2e-3, 5e-3), torch.bfloat16: (1e-2, 3e-2)}


def gpu_inputs(operation: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    """Sizes that kernels are made for; small parameters stay fp32."""
    g = torch.Generator().manual_seed(0)
    length, batch, heads, head_dim, groups, states, inner = 200, 2, 4, 64, 2, 64, 256

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    if operation == "ssd":
        inputs = {
            "x_LBHP": normal(length, batch, heads, head_dim), "dt_LBH": torch.rand(length, batch, heads, generator=g),
            "A_H": -torch.rand(heads, generator=g) - 0.1, "B_LBGN": normal(length, batch, groups, states),
            "C_LBGN": normal(length, batch, groups, states), "D_H": normal(heads),
        }  # fmt: skip
        return inputs, {"chunk_size": 64, "need_state": False}
    if operation == "selective_scan":
        inputs = {
            "x_LBI": normal(length, batch, inner), "dt_LBI": normal(length, batch, inner) - 1,
            "A_IN": -torch.rand(inner, 16, generator=g) - 0.1, "B_LBN": normal(length, batch, 16),
            "C_LBN": normal(length, batch, 16), "D_I": normal(inner), "z_LBI": normal(length, batch, inner),
            "dt_bias_I": normal(inner),
        }  # fmt: skip
        return inputs, {"dt_softplus": True, "need_state": False}
    if operation == "causal_conv":
        inputs = {"x_LBC": normal(length, batch, inner), "weight_CK": normal(inner, 4), "bias_C": normal(inner)}
        return inputs, {}
    return {"y": normal(length, batch, inner), "z": normal(length, batch, inner), "weight_D": normal(inner)}, {
        "num_groups": 4
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("operation", "library", "packed"), GPU_CASES)
def test_kernels_on_a_gpu_agree_with_float64(monkeypatch, operation, library, packed, dtype):
    adapter = backends.KERNELS[operation][library]
    if find_spec(adapter.module.split(".")[0]) is None:
        pytest.skip(f"{adapter.distribution} is not installed")
    kept_fp32 = {"A_H", "D_H", "dt_LBH", "A_IN", "D_I", "dt_bias_I"}
    single, fixed = gpu_inputs(operation, dtype)
    single = {n: t.cuda().to(torch.float32 if n in kept_fp32 else dtype) for n, t in single.items()}
    if packed:
        ids = torch.tensor([0] * 70 + [1] + [2] * 100 + [-1] * 29)
        fixed["seq_idx_LB"] = torch.stack([ids, torch.zeros_like(ids)], 1).cuda()
    function = getattr(backends, operation)
    monkeypatch.setenv(backends.VARIABLE, library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no silent fall back
        got = evaluate(function, {n: t.detach().requires_grad_() for n, t in single.items()}, **fixed)
    monkeypatch.setenv(backends.VARIABLE, "torch")
    want = evaluate(function, {n: t.detach().double().requires_grad_() for n, t in single.items()}, **fixed)
    if len(want) > len(got):
        del want[1]
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        tolerance = GPU_TOLERANCES[dtype][0 if number == 0 else 1]
        assert float((a.double() - b).abs().max()) <= tolerance * float(b.abs().max()), number


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["ssd", "selective_scan", "causal_conv", "gated_rms_norm"])
def test_torchs_own_path_on_a_gpu_agrees_with_the_cpu(monkeypatch, operation, dtype):
    monkeypatch.setenv(backends.VARIABLE, "torch")
    inputs, fixed = gpu_inputs(operation, dtype)
    function = getattr(backends, operation)
    results = [
        evaluate(function, {n: t.to(device, dtype).detach().requires_grad_() for n, t in inputs.items()}, **fixed)
        for device in ("cuda", "cpu")
    ]
    for a, b in zip(*results, strict=True):
        assert float((a.cpu().double() - b.double()).abs().max()) <= 1e-2 * float(b.double().abs().max())
