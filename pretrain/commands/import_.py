"""``pretrain import``: take over a model in Hugging Face's format."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="HF_DIR", type=Path, help="folder as `save_pretrained` writes it")
    parser.add_argument("target", metavar="DIR", type=Path, help="new or empty folder")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _import(arguments))


def _import(arguments: argparse.Namespace) -> int:
    from pretrain.checkpoint.locate import IMPORTED_CHECKPOINT
    from pretrain.commands.launch import program, shown
    from pretrain.exchange.import_model import import_folder
    from pretrain.exchange.imported import MODEL_FILE, MODEL_OPTION
    from pretrain.exchange.tokenizer import TOKENIZER_FILE

    done = import_folder(arguments.source, arguments.target)
    target = arguments.target
    print(f"{done.config.architecture.class_name}: {done.num_parameters:,} parameters")
    for note in done.notes:
        print(f"note: {note}")
    print(f"  {shown(target / MODEL_FILE)}  the model as an option of the config group `model`")
    print(f"  {shown(target / IMPORTED_CHECKPOINT)}  its weights")
    if (target / TOKENIZER_FILE).is_file():
        print(f"  {shown(target / TOKENIZER_FILE)}  its tokenizer, for `pretrain data prepare --tokenizer`")
    overrides = f"model={MODEL_OPTION} train.init_from={shown(target)}"
    print(f"Train it further: {program()} run --config-dir {shown(target)} {overrides} data=...")
    return 0
