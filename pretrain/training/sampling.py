"""Text samples from a model in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


class TextSampler:
    """Completes prompts with a model that offers recurrent generation and a ``tokenizer.json``."""

    def __init__(self, tokenizer_path: str | Path, *, temperature: float = 0.7, top_k: int = 40) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer_path))
        self._temperature = temperature
        self._top_k = top_k

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether the model has the generation interface of ours (``init_cache``, ``prefill``, ``decode``)."""
        return all(callable(getattr(model, name, None)) for name in ("init_cache", "prefill", "decode"))

    def complete(self, model: nn.Module, prompt: str, max_new_tokens: int, *, seed: int) -> str:
        """Text that continues ``prompt`` (not included), the same for the same seed."""
        from pretrain.models.generation import generate

        begin = self._tokenizer.token_to_id("<|bos|>")
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        prompt_ids = ([begin] if begin is not None else []) + ids
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                tokens = generate(
                    model,
                    prompt_ids,
                    max_new_tokens,
                    temperature=self._temperature,
                    top_k=self._top_k,
                    seed=seed,
                    stop_token=self._tokenizer.token_to_id("<|eos|>"),
                )
        finally:
            model.train(was_training)
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
