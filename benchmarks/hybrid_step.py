"""Training steps of whole models against the same architectures in transformers.

Pure Mamba-2 (Mamba2ForCausalLM), a hybrid (NemotronHForCausalLM) and pure attention (LlamaForCausalLM) with the same
weights, batch and threads, at several lengths: forward, next-token loss, backward and AdamW step in fp32. Before
anything is timed, both models must give the same loss. Contenders:

* ours: this platform's model and loss, with a chunk of 64 tokens for Mamba-2 layers;
* transformers: its model and loss as they come (pure-torch Mamba-2 layers, SDPA attention), with its default chunk of
  256 tokens for Mamba-2 layers, and with a chunk of 64, which takes less memory;
* floor: what is left of the model without its sequence mixing: projections, plain convolution, norms, MLPs, head, loss.

Each contender is a process of its own, so that peak memory is its own too; they take turns, a step a turn, and ratios
are taken within a round. `python benchmarks/hybrid_step.py` takes about half an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from results_file import RESULTS, quartiles, write_result
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH, HEADS, KV_HEADS, HEAD_DIM, STATE, HIDDEN, VOCABULARY = 512, 8, 2, 64, 64, 1536, 8192
PATTERNS = {"mamba2": "MMMM", "hybrid": "M-M*-M-", "attention": "*-*-"}
ROWS = {512: 4, 2048: 1, 8192: 1}
OUR_CHUNK = 64
CONTENDERS = ("ours", "transformers", "transformers, chunk 64", "floor")


@dataclass(frozen=True)
class Task:
    """One contender at one length. ``folder`` holds the common weights in Hugging Face format."""

    model: str
    contender: str
    length: int
    folder: str
    threads: int


def their_model(name: str, chunk: int | None) -> Any:
    """The architecture in transformers, untrained."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Mamba2Config,
        Mamba2ForCausalLM,
        NemotronHConfig,
        NemotronHForCausalLM,
    )

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "tie_word_embeddings": True}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if name == "mamba2":
        chunks = {} if chunk is None else {"chunk_size": chunk}
        config: Any = Mamba2Config(
            num_hidden_layers=len(PATTERNS[name]), num_heads=2 * WIDTH // HEAD_DIM, head_dim=HEAD_DIM,
            state_size=STATE, n_groups=1, expand=2, use_cache=False, **chunks, **common, **tokens,
        )  # fmt: skip
        return Mamba2ForCausalLM(config)
    attention = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    if name == "attention":
        config = LlamaConfig(
            num_hidden_layers=len(PATTERNS[name]) // 2, intermediate_size=HIDDEN, max_position_embeddings=8192,
            use_cache=False, **attention, **common, **tokens,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    chunks = {"chunk_size": 256 if chunk is None else chunk}
    config = NemotronHConfig(
        hybrid_override_pattern=PATTERNS[name], intermediate_size=HIDDEN, mamba_num_heads=2 * WIDTH // HEAD_DIM,
        mamba_head_dim=HEAD_DIM, ssm_state_size=STATE, n_groups=1, use_cache=False, **chunks, **attention,
        **(common | {"tie_word_embeddings": False}), **tokens,
    )  # fmt: skip
    return NemotronHForCausalLM(config)


def save_weights(name: str, folder: Path) -> None:
    """Random weights of moderate size, in Hugging Face format and, in the folder ``ours``, imported."""
    from pretrain.exchange.import_model import import_folder

    torch.manual_seed(0)
    model = their_model(name, None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    import_folder(folder, folder / "ours")


class Floor(nn.Module):
    """The matrices, convolutions and norms of a pattern, in plain torch, without sequence mixing. x_BLD -> logits."""

    def __init__(self, pattern: str, gated_mlp: bool) -> None:
        super().__init__()
        self.pattern, self.gated = pattern, gated_mlp
        inner, heads = 2 * WIDTH, 2 * WIDTH // HEAD_DIM
        self.sizes = [inner, inner + 2 * STATE, heads]
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(len(pattern) + 1))
        self.layers = nn.ModuleList()
        for symbol in pattern:
            layer = nn.ModuleDict()
            if symbol == "M":
                layer["up"] = nn.Linear(WIDTH, sum(self.sizes), bias=False)
                channels = self.sizes[1]
                layer["conv"] = nn.Conv1d(channels, channels, 4, groups=channels, padding=3)
                layer["norm"] = nn.RMSNorm(inner)
                layer["down"] = nn.Linear(inner, WIDTH, bias=False)
            elif symbol == "*":
                layer["up"] = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
                layer["down"] = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
            else:
                layer["up"] = nn.Linear(WIDTH, (2 if gated_mlp else 1) * HIDDEN, bias=False)
                layer["down"] = nn.Linear(HIDDEN, WIDTH, bias=False)
            self.layers.append(layer)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x = self.embedding(tokens_BL)
        for symbol, norm, layer in zip(self.pattern, self.norms, self.layers, strict=False):
            assert isinstance(layer, nn.ModuleDict)
            up = layer["up"](norm(x))
            if symbol == "M":
                z, packed, _ = up.split(self.sizes, dim=-1)
                packed = F.silu(layer["conv"](packed.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
                up = layer["norm"](packed[..., : self.sizes[0]] * F.silu(z))
            elif symbol == "*":
                up = up[..., : HEADS * HEAD_DIM]
            elif self.gated:
                gate, up = up.chunk(2, dim=-1)
                up = F.silu(gate) * up
            else:
                up = F.relu(up).square()
            x = x + layer["down"](up)
        return F.linear(self.norms[-1](x), self.embedding.weight)


def build(task: Task) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The model and its mean loss of predicting tokens[:, 1:], as a function of tokens [B, L + 1]."""
    if task.contender == "ours":
        from pretrain.checkpoint.reader import CheckpointReader, load_weights
        from pretrain.exchange.imported import imported_model
        from pretrain.objectives.cross_entropy import cross_entropy_rows
        from pretrain.parallel.layers import TorchLayers

        imported = Path(task.folder, "ours")
        config = imported_model(imported)
        mamba2 = dataclasses.replace(config.mamba2, chunk_size=OUR_CHUNK)
        model = dataclasses.replace(config, mamba2=mamba2).build(TorchLayers())
        load_weights(model, CheckpointReader(imported / "checkpoint"))

        def our_loss(tokens: Tensor) -> Tensor:
            logits_LBV = model(tokens[:, :-1].t())
            return cross_entropy_rows(logits_LBV.flatten(0, 1), tokens[:, 1:].t().flatten())[0].mean()

        return model, our_loss
    if task.contender == "floor":
        floor = Floor(PATTERNS[task.model], task.model == "attention")
        return floor, lambda tokens: F.cross_entropy(floor(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    theirs = their_model(task.model, 64 if task.contender.endswith("64") else None)
    theirs.load_state_dict(type(theirs).from_pretrained(task.folder).state_dict())

    def their_loss(tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:].contiguous()
        loss: Tensor = theirs(tokens[:, :-1], labels=targets, shift_labels=targets).loss
        return loss

    return theirs, their_loss


def contend(task: Task, connection: Connection) -> None:
    """Process of one contender: answers the loss first, then seconds and peak bytes of one step for every message."""
    torch.set_num_threads(task.threads)
    model, loss_of = build(task)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(VOCABULARY, (ROWS[task.length], task.length + 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        connection.send(float(loss_of(tokens)))
    before = _peak_bytes()
    while _next_turn(connection):
        start = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        connection.send((time.perf_counter() - start, _peak_bytes(), before))


def _next_turn(connection: Connection) -> bool:
    try:
        return bool(connection.recv())
    except EOFError:
        return False


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_contenders(tasks: list[Task]) -> dict[str, tuple[Any, Connection]]:
    context = multiprocessing.get_context("spawn")
    opened = {}
    for task in tasks:
        mine, theirs = context.Pipe()
        process = context.Process(target=contend, args=(task, theirs), daemon=True)
        process.start()
        theirs.close()
        opened[task.contender] = (process, mine)
    return opened


def measure(tasks: list[Task], rounds: int) -> Iterator[tuple[str, list[float], int]]:
    """(contender, seconds per round, peak bytes); a contender that dies (of memory) is left out."""
    opened = open_contenders(tasks)
    losses = {}
    for name, (_, connection) in opened.items():
        try:
            losses[name] = connection.recv()
        except EOFError:
            print(f"  {name}: its process ended while it was set up or evaluated (memory?)")
    compared = {name: loss for name, loss in losses.items() if name != "floor"}
    if max(compared.values()) - min(compared.values()) > 1e-3:
        sys.exit(f"{tasks[0].model} at {tasks[0].length} tokens: the losses differ: {compared}")
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    peaks = {}
    for turn in range(rounds + 1):
        for name in list(seconds):
            process, connection = opened[name]
            connection.send(True)
            try:
                duration, peaks[name], _ = connection.recv()
            except EOFError:
                process.join()
                print(f"  {name}: its process ended in training with exit code {process.exitcode} (memory?)")
                del seconds[name]
                continue
            if turn:
                seconds[name].append(duration)
    for process, connection in opened.values():
        connection.close()
        process.join(10)
    for name, turns in seconds.items():
        yield name, turns, peaks[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--lengths", nargs="+", type=int, choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    shape = {
        "width": WIDTH, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "state": STATE,
        "mlp_hidden": HIDDEN, "vocabulary": VOCABULARY, "patterns": PATTERNS, "our_chunk": OUR_CHUNK,
    }  # fmt: skip
    table = _earlier_rows(shape)
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models:
            folder = Path(temporary) / name
            save_weights(name, folder)
            for length in arguments.lengths:
                # A chunk of 256 at 8,192 tokens keeps tens of GB for the backward pass in transformers.
                contenders = [
                    contender
                    for contender in CONTENDERS
                    if not (name == "attention" and contender.endswith("64"))
                    and not (name != "attention" and contender == "transformers" and length > 2048)
                ]
                tasks = [Task(name, contender, length, str(folder), arguments.threads) for contender in contenders]
                measured = {who: (turns, peak) for who, turns, peak in measure(tasks, arguments.rounds)}
                row = _row(name, length, measured) | {"rounds": arguments.rounds, "threads": arguments.threads}
                _print_row(row)
                table = [other for other in table if (other["model"], other["length"]) != (name, length)] + [row]
                # After every row, since the whole takes long.
                write_result("hybrid_step", {"shape": shape, "table": table})


def _earlier_rows(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the committed record that this call does not measure again."""
    path = RESULTS / "hybrid_step.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    same = record.get("shape") == json.loads(json.dumps(shape))
    return list(record["table"]) if same else []


def _row(name: str, length: int, measured: dict[str, tuple[list[float], int]]) -> dict[str, Any]:
    tokens = ROWS[length] * length
    ours = measured["ours"][0]
    row: dict[str, Any] = {"model": name, "length": length, "rows": ROWS[length], "contenders": {}, "ratios": {}}
    for who, (turns, peak) in measured.items():
        row["contenders"][who] = {
            "tokens_per_s": quartiles([tokens / turn for turn in turns]),
            "peak_gb": round(peak / 1e9, 2),
        }
        if who != "ours":
            pairs = [theirs / own for theirs, own in zip(turns, ours, strict=True)]
            row["ratios"][f"{who} / ours"] = quartiles(pairs)
    return row


def _print_row(row: dict[str, Any]) -> None:
    print(f"{row['model']}, {row['rows']} x {row['length']} tokens", flush=True)
    for who, figures in row["contenders"].items():
        ratio = row["ratios"].get(f"{who} / ours")
        shown = (
            "" if ratio is None else f"   time {ratio['median']:.2f} of ours ({ratio['low']:.2f}-{ratio['high']:.2f})"
        )
        speed = figures["tokens_per_s"]["median"]
        print(f"  {who:24}{speed:10.0f} tokens/s{figures['peak_gb']:8.2f} GB{shown}", flush=True)


if __name__ == "__main__":
    main()
