"""Text samples from a model in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from pretrain.models.generation import RecurrentLM, generate


class TextSampler:
    """Completes prompts with a model that offers recurrent generation and a ``tokenizer.json``.

    Raises:
        ValueError: the tokenizer cannot be used, or names no token for the beginning and end of a document.
    """

    def __init__(self, tokenizer_path: str | Path, *, temperature: float = 0.7, top_k: int = 40) -> None:
        from tokenizers import Tokenizer

        from data_pipeline.prepare.tokenizer import load_tokenizer_file

        self._file = load_tokenizer_file(tokenizer_path)
        self._tokenizer: Any = Tokenizer.from_str(self._file.text)
        self._temperature = temperature
        self._top_k = top_k

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether the model can continue from a cache (:class:`pretrain.models.generation.RecurrentLM`)."""
        return all(callable(getattr(model, name, None)) for name in ("init_cache", "prefill", "decode"))

    def complete(self, model: nn.Module, prompt: str, max_new_tokens: int, *, seed: int) -> str:
        """Text that continues ``prompt`` (not included), the same for the same seed."""
        prompt_ids = [self._file.bos_id, *self._tokenizer.encode(prompt, add_special_tokens=False).ids]
        tokens = generate(
            cast(RecurrentLM, model),
            prompt_ids,
            max_new_tokens,
            temperature=self._temperature,
            top_k=self._top_k,
            seed=seed,
            stop_token=self._file.eos_id,
        )
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
