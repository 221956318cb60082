"""EleutherAI's lm-evaluation-harness on a model of ours. Imports ``lm_eval``: only the ``eval`` verb imports this.

The harness decides what is asked and how answers are judged; this adapter turns its requests into tokens and scores
them. Every text begins with the token that begins documents in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import nn

from data_pipeline.prepare.tokenizer import load_tokenizer_file
from pretrain.evaluation.scoring import continuations, log_likelihoods

_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k")
_DEFAULT_NEW_TOKENS = 256


class HarnessLM(TemplateLM):
    """A causal language model with its ``tokenizer.json``, as the harness calls it.

    Args:
        model: called as ``model(tokens_LB)``, in evaluation mode; ``generate_until`` tasks also need the methods of
            :class:`pretrain.models.generation.RecurrentLM`.
        max_length: tokens that the model reads at most; longer contexts lose their beginning, longer texts are cut
            into windows as the harness does.
        seed: keys draws of tasks that sample.
    """

    def __init__(
        self, model: nn.Module, tokenizer_path: str | Path, *, batch_size: int, max_length: int, seed: int = 0
    ) -> None:
        from tokenizers import Tokenizer

        super().__init__()
        self._file = load_tokenizer_file(tokenizer_path)
        self._tokenizer: Any = Tokenizer.from_str(self._file.text)
        self._model = model
        self._device = next(model.parameters()).device
        self._seed = seed
        self.batch_size = batch_size
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return self._file.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._file.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, after the one that begins a document unless told otherwise."""
        ids = list(self._tokenizer.encode(string, add_special_tokens=False).ids)
        return ids if add_special_tokens is False else [self._file.bos_id, *ids]

    def tok_decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations after contexts; of no token after no text 0, which it cannot ask."""
        found = [(0.0, True)] * len(requests)
        asked = [
            number
            for number, request in enumerate(requests)
            if request.args[0] or self.tok_encode(request.args[1], add_special_tokens=False)
        ]
        scores = super().loglikelihood([requests[n] for n in asked], disable_tqdm=disable_tqdm) if asked else []
        for number, score in zip(asked, scores, strict=True):
            found[number] = score
        return found

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` that predict every token once."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(utils.make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, the end of the document or the task's number of tokens.

        Raises:
            ValueError: the model cannot generate, or the task asks for what is not offered here.
        """
        if not all(callable(getattr(self._model, name, None)) for name in ("init_cache", "prefill", "decode")):
            raise ValueError(
                f"{type(self._model).__name__} cannot generate: it needs the methods init_cache, prefill and decode "
                "(see pretrain.models.generation.RecurrentLM); leave out tasks of output_type generate_until"
            )
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        found = [""] * len(requests)
        for numbers in by_settings.values():
            texts = self._generate([requests[n].args[0] for n in numbers], requests[numbers[0]].args[1])
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        if settings.get("do_sample") and settings.get("temperature") is None:
            settings = settings | {"temperature": 1.0}  # the harness would put 0, which does not sample
        settings = dict(normalize_gen_kwargs(settings, _DEFAULT_NEW_TOKENS))
        unknown = sorted(settings.keys() - set(_GENERATION))
        if unknown:
            raise ValueError(
                f"generation_kwargs of a task: {', '.join(unknown)} are not offered; use {', '.join(_GENERATION)}"
            )
        stops = [stop for stop in settings.get("until", []) if stop]
        room = self.max_length - settings["max_gen_toks"]
        if room < 1:
            raise ValueError(
                f"a task generates {settings['max_gen_toks']} tokens, but the model reads {self.max_length} in all; "
                "lower max_gen_toks in its generation_kwargs, or raise --max-length if the model can read more"
            )

        def ended(new_tokens: list[int]) -> bool:
            if new_tokens[-1] == self._file.eos_id:
                return True
            text = self.tok_decode(new_tokens) if stops else ""
            return any(stop in text for stop in stops)

        prompts = []
        for context in contexts:
            ids = self.tok_encode(context)
            prompts.append(ids if len(ids) <= room else ids[-room:])
        new_tokens = continuations(
            self._model,
            prompts,
            max_new_tokens=settings["max_gen_toks"],
            ended=ended,
            batch_size=self.batch_size,
            temperature=float(settings.get("temperature") or 0.0),
            top_k=settings.get("top_k"),
            seed=self._seed,
        )
        texts = []
        for tokens in new_tokens:
            text = self.tok_decode(tokens)
            # Cut at the stop string that comes first.
            texts.append(text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))])
        return texts

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        return log_likelihoods(self._model, pairs, batch_size=self.batch_size, max_length=self.max_length)


def run_tasks(model: HarnessLM, tasks: list[str], folders: list[Path], limit: int | None) -> dict[str, Any]:
    """The harness's record of the tasks, which are found in the YAML files below ``folders`` and nowhere else.

    Raises:
        ValueError: naming the tasks that are not there, and those that are.
    """
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    known = sorted(manager.all_tasks)
    missing = [task for task in tasks if task not in known]
    if missing:
        raise ValueError(
            f"no task {', '.join(missing)} in {', '.join(map(str, folders))}; there are: {', '.join(known) or 'none'}"
        )
    record = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    assert record is not None
    return dict(record)
