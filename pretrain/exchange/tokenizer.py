"""The tokenizer that goes with a model: copied with it, and checked against its vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.exchange.architecture import ExchangeError
from pretrain.exchange.imported import TOKENIZER_FILE as TOKENIZER_FILE

TOKENIZER_CONFIG = "tokenizer_config.json"
ACCOMPANYING = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class TokenizerFacts:
    """What a model needs to know of a ``tokenizer.json``: number of ids (gaps included), and ids by token."""

    num_ids: int
    ids: dict[str, int]


def tokenizer_facts(path: Path) -> TokenizerFacts:
    """Read a ``tokenizer.json``.

    Raises:
        ExchangeError: it cannot be parsed.
    """
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ExchangeError(
            f"{path} is no tokenizer: {error}; replace it by the `tokenizer.json` of the model"
        ) from None
    return TokenizerFacts(max(ids.values(), default=-1) + 1, ids)


def check_vocabulary(path: Path, vocab_size: int) -> TokenizerFacts:
    """Facts of a tokenizer that fits a model; a model may have more ids than its tokenizer (padding).

    Raises:
        ExchangeError: the tokenizer has ids that the model has not.
    """
    facts = tokenizer_facts(path)
    if facts.num_ids > vocab_size:
        raise ExchangeError(
            f"{path.name} has ids up to {facts.num_ids - 1}, the model a vocabulary of {vocab_size}: they do not "
            "belong together; use the tokenizer that the model was trained with"
        )
    return facts


def framing_tokens(path: Path) -> tuple[str, str] | None:
    """Tokens that begin and end a document, by the names that published tokenizers give them; None if unknown."""
    from data_pipeline.prepare.tokenizer import load_tokenizer_file

    try:
        file = load_tokenizer_file(path)
    except ValueError:
        return None
    names = {number: token for token, number in tokenizer_facts(path).ids.items()}
    return names[file.bos_id], names[file.eos_id]


def tokenizer_config(path: Path) -> dict[str, Any]:
    """A ``tokenizer_config.json`` for a bare ``tokenizer.json``."""
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if (tokens := framing_tokens(path)) is not None:
        values |= {"bos_token": tokens[0], "eos_token": tokens[1], "pad_token": tokens[1]}
    return values


def special_ids(path: Path) -> dict[str, int | None]:
    """``bos_token_id`` and ``eos_token_id`` for a model's ``config.json``; None where the tokenizer does not tell.

    A ``tokenizer_config.json`` beside the file counts first.
    """
    names: dict[str, Any] = {}
    beside = path.with_name(TOKENIZER_CONFIG)
    if beside.is_file():
        try:
            names = dict(json.loads(beside.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ExchangeError(f"{beside} cannot be read: {error}; restore it") from error
    tokens = framing_tokens(path)
    ids = tokenizer_facts(path).ids
    result: dict[str, int | None] = {}
    for key, place in (("bos", 0), ("eos", 1)):
        token = names.get(f"{key}_token", tokens[place] if tokens else None)
        token = token.get("content") if isinstance(token, dict) else token
        result[f"{key}_token_id"] = ids.get(token) if isinstance(token, str) else None
    return result
