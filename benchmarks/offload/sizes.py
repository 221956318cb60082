"""Models of the benchmark by size, and the host memory that a way to offload needs for each. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.models.hybrid.config import HybridConfig
from pretrain.nn.attention_config import AttentionConfig
from pretrain.nn.mlp_config import MLPConfig

TINY = "tiny"


@dataclass(frozen=True)
class Size:
    """A decoder of ``blocks`` pairs of attention and gated MLP. ``sequence``: tokens of a row at most."""

    name: str
    like: str
    blocks: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    tied: bool
    qk_norm: bool = False
    sequence: int = 2048

    def model(self) -> HybridConfig:
        return HybridConfig(
            pattern="*-" * self.blocks,
            width=self.width,
            vocab_size=self.vocabulary,
            attention=AttentionConfig(
                num_heads=self.heads,
                num_kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                rope_theta=500_000.0,
                qk_norm=self.qk_norm,
            ),
            mlp=MLPConfig(hidden_size=self.hidden, activation="swiglu"),
            tied_embeddings=self.tied,
        )

    @property
    def parameters(self) -> int:
        """All of them are trained."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        norms = 2 * self.width + (2 * self.head_dim if self.qk_norm else 0)
        block = attention + 3 * self.width * self.hidden + norms
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.blocks * block + tables + self.width


SIZES = {
    size.name: size
    for size in (
        Size(TINY, "nothing: a function check", 2, 64, 4, 2, 16, 176, 512, tied=True, sequence=32),
        Size("1b", "Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
        Size("3b", "Llama-3.2-3B", 28, 3072, 24, 8, 128, 8192, 128256, tied=True),
        Size("4b", "Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151936, tied=True, qk_norm=True),
        Size("8b", "Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, tied=False),
    )
}


def rows(size: Size, tokens: int) -> tuple[int, int]:
    """Sequences of a step, and tokens of each.

    Raises:
        ValueError: ``tokens`` are not whole sequences.
    """
    length = min(size.sequence, tokens)
    if tokens < 2 or tokens % length:
        raise ValueError(f"--tokens {tokens}: expected a multiple of the sequence of {size.sequence} tokens, or fewer")
    return tokens // length, length
