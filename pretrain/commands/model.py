"""``pretrain model describe``: what a model holds and costs, from its configuration alone."""

from __future__ import annotations

import json
import os
import sys
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.models.hybrid.config import HybridConfig
    from pretrain.nn.cost import Cost

INVALID = 2
LENGTHS = [2**power for power in range(9, 18)]
DEFAULT_LENGTH = 4096
BYTES = {"fp32": 4, "bf16": 2}


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the ``model`` verb."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{describe}")
    text = "print layers, parameters, FLOPs, activation and generation memory of a model, without building it"
    describe = actions.add_parser("describe", help=text, description=text)
    describe.add_argument(
        "overrides", nargs="*", help="a run directory, or group=option and key.path=value, for example model=mamba_130m"
    )
    describe.add_argument("--config-dir", help="a folder of your own config groups, searched before the shipped one")
    describe.add_argument(
        "--length", action=_Lengths, nargs="+", default=LENGTHS, metavar="N", help="sequence lengths to list, in tokens"
    )
    describe.add_argument(
        "--train-length",
        type=_positive,
        metavar="N",
        help=f"tokens of a training sequence (default: the model's max_sequence_length, else {DEFAULT_LENGTH})",
    )
    describe.add_argument("--precision", choices=list(BYTES), default="bf16", help="of parameters and activations")
    describe.add_argument("--json", action="store_true", help="print exact numbers as JSON")


def run(args: Namespace) -> int:
    """Run the verb; 0, or 2 when the model's configuration is not valid."""
    from pretrain.config.violation import InvalidConfigError

    try:
        config = _model([*args.overrides, *getattr(args, "overrides_behind", [])], args.config_dir)
    except (InvalidConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return INVALID
    description = describe(config, args.precision, args.length, args.train_length)
    print(json.dumps(description, indent=1) if args.json else "\n\n".join(_tables(description)))
    return 0


def describe(
    config: HybridConfig, precision: str = "bf16", lengths: Sequence[int] = LENGTHS, train_length: int | None = None
) -> dict[str, Any]:
    """Everything that the command prints, as plain numbers.

    Args:
        precision: of parameters and activations; states that are kept in fp32 count as such.
        lengths: sequence lengths, in tokens, of the ``lengths`` list.
        train_length: sequence length of the figures in ``parts``; None: the longest that the model is meant for.
    """
    from pretrain.models.hybrid.cost import EMBEDDING, HEAD, NORMS, cost_by_part
    from pretrain.nn.cost import Cost

    train_length = train_length or config.max_sequence_length or DEFAULT_LENGTH
    width = BYTES[precision]
    pattern = config.layer_pattern
    kinds = [(symbol, config.mixer(symbol).label) for symbol in dict.fromkeys(pattern)]
    counts = {label: pattern.count(symbol) for symbol, label in kinds}
    parts = cost_by_part(config, train_length, width)
    total = sum(parts.values(), start=Cost())
    order = [EMBEDDING, *(label for _, label in kinds), NORMS, HEAD]
    return {
        "width": config.width,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tied_embeddings,
        "precision": precision,
        "pattern": pattern,
        "layers": [{"symbol": symbol, "kind": label, "layers": counts[label]} for symbol, label in kinds],
        "train_length": train_length,
        "parts": [{"part": name, "layers": counts.get(name), **_figures(parts[name])} for name in order],
        "total": _figures(total),
        "lengths": [
            {"length": length, **_at_length(cost_by_part(config, length, width), config)} for length in lengths
        ],
    }


def _model(overrides: list[str], config_dir: str | None) -> HybridConfig:
    """The checked model of a run directory or of a composition. Faults in other parts of it are not looked for.

    Raises:
        InvalidConfigError: with all faults of the composition and of the model.
        ValueError: for a folder that is no run directory, or a model of a kind that states no cost.
    """
    from pretrain.config.components import add_import_paths, check_component
    from pretrain.config.compose import compose_leniently
    from pretrain.config.typecheck import Report
    from pretrain.config.violation import InvalidConfigError
    from pretrain.models.hybrid.config import HybridConfig

    report = Report()
    if len(overrides) == 1 and os.path.isdir(overrides[0]):
        from launchers.run_dir import RunDir

        tree: dict[str, Any] = RunDir.open(overrides[0]).config()
    else:
        composition = compose_leniently(overrides, config_dir)
        tree = composition.tree
        report.violations.extend(composition.violations)
    if isinstance(folders := tree.get("run", {}).get("import_paths"), list):
        add_import_paths(folders)
    model = check_component(tree.get("model"), "model", report)
    if report.violations:
        raise InvalidConfigError(report.violations)
    if not isinstance(model, HybridConfig):
        found = tree["model"]["_target_"]
        expected = f"{HybridConfig.__module__}.{HybridConfig.__name__}"
        raise ValueError(
            f"model._target_: found {found}, expected {expected}, which states its cost; choose such a model"
        )
    return model


def _figures(cost: Cost) -> dict[str, float]:
    return {
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "forward_flops_per_token": cost.flops_per_token,
        "training_flops_per_token": 3 * cost.flops_per_token,
        "activation_bytes_per_token": cost.activation_bytes_per_token,
    }


def _at_length(parts: dict[str, Cost], config: HybridConfig) -> dict[str, float]:
    """Figures of a sequence of some length; keys and values are kept apart from states of constant size."""
    attention = parts[config.attention.label].state_bytes if config.attention.label in parts else 0
    states = sum(cost.state_bytes for cost in parts.values())
    flops = sum(cost.flops_per_token for cost in parts.values())
    return {
        "forward_flops_per_token": flops,
        "training_flops_per_token": 3 * flops,
        "activation_bytes_per_token": sum(cost.activation_bytes_per_token for cost in parts.values()),
        "kv_cache_bytes": attention,
        "recurrent_state_bytes": states - attention,
        "generation_bytes": states,
    }


# ---- printing


def _tables(description: dict[str, Any]) -> list[str]:
    total, length = description["total"], description["train_length"]
    layers = sum(kind["layers"] for kind in description["layers"])
    head = [
        f"{layers} layers, width {description['width']:,}, vocabulary {description['vocab_size']:,}"
        f" ({'tied' if description['tied_embeddings'] else 'untied'} head), {description['precision']}",
        f"{count(total['parameters'])} parameters ({total['parameters']:,})"
        + (
            f", of which a token uses {count(total['active_parameters'])} ({total['active_parameters']:,})"
            if total["active_parameters"] != total["parameters"]
            else ""
        ),
    ]
    layer_rows = [
        (kind["symbol"], kind["kind"], f"{kind['layers']:,}", f"{kind['layers'] / layers:.1%}")
        for kind in description["layers"]
    ]
    part_rows = [
        (
            part["part"] + (f" x {part['layers']}" if part["layers"] else ""),
            f"{part['parameters']:,}",
            f"{part['active_parameters']:,}",
            f"{part['parameters'] / total['parameters']:.1%}",
            flops(part["forward_flops_per_token"]),
            flops(part["training_flops_per_token"]),
            size(part["activation_bytes_per_token"]),
        )
        for part in [*description["parts"], {"part": "total", "layers": None, **total}]
    ]
    length_rows = [
        (
            f"{row['length']:,}",
            flops(row["forward_flops_per_token"]),
            flops(row["training_flops_per_token"]),
            size(row["activation_bytes_per_token"]),
            size(row["kv_cache_bytes"]),
            size(row["recurrent_state_bytes"]),
            size(row["generation_bytes"]),
        )
        for row in description["lengths"]
    ]
    return [
        "\n".join(head),
        _table(
            "Layers, first to last: " + grouped(description["pattern"]), ("", "kind", "layers", "share"), layer_rows
        ),
        _table(
            f"Parts, in training sequences of {length:,} tokens",
            ("part", "parameters", "active", "share", "forward/token", "training/token", "kept/token"),
            part_rows,
        ),
        _table(
            "By sequence length: FLOPs and kept activations of a token in training; memory of one generated sequence",
            ("length", "forward/token", "training/token", "kept/token", "KV cache", "recurrent", "generation"),
            length_rows,
        ),
    ]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first one (two with an empty heading) to the left; in colour on a terminal."""
    lefts = 2 if not header[0] else 1
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        cells = [
            "  ".join(
                text.ljust(width) if i < lefts else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *rows]
        ]
        return "\n".join([title, *(f"  {line}" for line in cells)])
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim", padding=(0, 0, 0, 2))
    for i, heading in enumerate(header):
        table.add_column(heading, justify="left" if i < lefts else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(Text(title, style="bold"), soft_wrap=True)  # a pattern stays one line, to be copied
        console.print(table)
    return capture.get().rstrip()


def grouped(pattern: str) -> str:
    """A pattern as it is, or with repeated pieces counted where that is at most half as long: ``(M-)x24``."""
    best = pattern
    for period in range(1, len(pattern) // 2 + 1):
        pieces = [pattern[i : i + period] for i in range(0, len(pattern), period)]
        runs = [(piece, len(list(run))) for piece, run in groupby(pieces)]
        text = " ".join(piece if times == 1 else f"({piece})x{times}" for piece, times in runs)
        if len(text) <= len(pattern) // 2 and len(text) < len(best):
            best = text
    return best


def count(number: float) -> str:
    """1,234,567 as '1.23 M'."""
    return _scaled(number, 1000, ("", " K", " M", " B", " T"))


def flops(number: float) -> str:
    """FLOPs with a decimal prefix."""
    return _scaled(number, 1000, (" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def size(number: float) -> str:
    """Bytes with a binary prefix."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(number: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= step and power < len(units) - 1:
        number /= step
        power += 1
    digits = 0 if power == 0 or number >= 100 else 1 if number >= 10 else 2
    return f"{number:,.{digits}f}{units[power]}"


class _Lengths(Action):
    """Numbers; overrides that stand behind them are not theirs."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        numbers = [word for word in values if "=" not in word]
        try:
            setattr(namespace, self.dest, [_positive(word) for word in numbers])
        except ValueError as error:
            raise ArgumentError(self, f"found {' '.join(numbers)}, expected positive numbers of tokens") from error
        namespace.overrides_behind = [word for word in values if "=" in word]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value
