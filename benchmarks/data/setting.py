"""What a run of the benchmarks works with: folders, sizes and how long to measure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import corpus
import pictures
from contender_process import ContenderProcess
from environments import python_of
from registry import Contender

_SMALLEST_CORPUS_MB = 300
TIMEOUT = 300.0


@dataclass(frozen=True)
class Setting:
    """``rounds`` turns of ``seconds`` each; ``quick`` shrinks every size for a trial."""

    work: Path
    rounds: int
    seconds: float
    quick: bool
    corpus_mb: int

    @property
    def shard_bytes(self) -> int:
        """Shards of 16 MiB (quick: 2), so that sixteen and more can be shuffled and shared between workers."""
        return 1 << 21 if self.quick else 1 << 24

    @property
    def block_tokens(self) -> int:
        """Tokens in a block member."""
        return 1 << 17 if self.quick else 1 << 20

    def corpus(self) -> Path:
        """The folder of the corpus; gathered on the first call."""
        folder = corpus.gather(self.work, self.corpus_mb)
        if not self.quick and int(str(corpus.describe(folder)["bytes"])) < _SMALLEST_CORPUS_MB << 20:
            print(f"warning: the corpus has less than {_SMALLEST_CORPUS_MB} MB; install more packages", file=sys.stderr)
        return folder

    def dataset(self) -> Path:
        """The corpus as our data set, made by ``pretrain data prepare text`` on the first call."""
        folder = self.corpus()
        out = self.work / f"dataset-{self.corpus_mb}"
        if not (out / "manifest.json").exists():
            command = prepare_command(folder / "text", out, corpus.tokenizer(folder), len(os.sched_getaffinity(0)))
            extra = ["--block-tokens", str(self.block_tokens), "--shard-bytes", str(self.shard_bytes)]
            run_logged([*command, *extra], self.log("prepare"))
        return out

    def pictures(self) -> Path:
        """Pictures with captions as our data set, made by ``pretrain data prepare images`` on the first call."""
        count = 250 if self.quick else 2000
        out = self.work / f"pictures-{count}"
        if not (out / "manifest.json").exists():
            raw = self.work / f"pictures-{count}-raw"
            shutil.rmtree(raw, ignore_errors=True)
            pictures.write_shards(raw, count)
            tokenizer = corpus.tokenizer(self.corpus())
            command = [
                sys.executable, "-m", "pretrain.cli", "data", "prepare", "images", str(raw / "*.tar"), str(out),
                "--tokenizer", str(tokenizer), "--validation-fraction", "0", "--shard-bytes", str(1 << 24),
            ]  # fmt: skip
            run_logged(command, self.log("prepare-images"))
        return out

    def log(self, name: str) -> Path:
        """Where the output of a child process goes."""
        folder = self.work / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def converted(self, contender: Contender) -> Path:
        """The folder for a contender's own form of the data set."""
        return self.work / "converted" / f"{contender.module}-{contender.variant}-{self.corpus_mb}"

    def open(self, contender: Contender, verb: str, workers: int = 0, dataset: Path | None = None) -> ContenderProcess:
        """A process of ``contender``: ``convert`` or ``serve``; of ``dataset``, else of the text."""
        dataset = dataset or self.dataset()
        arguments = [verb, contender.module, contender.variant, str(dataset), str(self.converted(contender))]
        if verb == "serve":
            arguments.append(str(workers))
        log = self.log(f"{verb}-{contender.module}-{contender.variant}-{workers}".replace(":", "-"))
        return ContenderProcess(python_of(self.work, contender.environment), arguments, log, TIMEOUT)


def prepare_command(source: Path, out: Path, tokenizer: Path, workers: int) -> list[str]:
    """``pretrain data prepare text`` without held-out documents."""
    return [
        sys.executable, "-m", "pretrain.cli", "data", "prepare", "text", str(source), str(out),
        "--tokenizer", str(tokenizer), "--validation-fraction", "0", "--workers", str(workers),
    ]  # fmt: skip


def run_logged(command: list[str], log: Path) -> None:
    """Run to the end; raises RuntimeError with the last line of the log when it fails."""
    with open(log, "wb") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{' '.join(command[:7])} ... ended with code {code}: {lines[-1] if lines else ''} ({log})")
