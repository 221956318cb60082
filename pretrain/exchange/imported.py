"""The parts of a folder that ``pretrain import`` wrote. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.models.hybrid.config import HybridConfig

IMPORT_FILE = "import.json"
TOKENIZER_FILE = "tokenizer.json"
MODEL_OPTION = "imported"
MODEL_FILE = f"model/{MODEL_OPTION}.yaml"


def is_imported(folder: Path) -> bool:
    """Whether ``folder`` is what ``pretrain import`` wrote."""
    return (folder / IMPORT_FILE).is_file()


def imported_model(folder: Path) -> HybridConfig:
    """The model of an imported folder, checked.

    Raises:
        InvalidConfigError: its file has been changed to something that is no model.
        ExchangeError: the file is not there, or holds another component.
    """
    from pretrain.config.components import check_component
    from pretrain.config.freeze import load
    from pretrain.config.typecheck import Report
    from pretrain.config.violation import InvalidConfigError
    from pretrain.exchange.architecture import ExchangeError
    from pretrain.models.hybrid.config import HybridConfig

    path = folder / MODEL_FILE
    try:
        tree = load(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ExchangeError(f"{path} cannot be read: {error}; run `pretrain import` again") from error
    report = Report()
    model = check_component(tree, "model", report)
    if report.violations:
        raise InvalidConfigError(report.violations)
    if not isinstance(model, HybridConfig):
        raise ExchangeError(
            f"{path} describes {type(model).__name__}, expected {HybridConfig.__name__}; run `pretrain import` again"
        )
    return model


def imported_tokenizer(folder: Path) -> Path | None:
    """The tokenizer of an imported folder; None if it came without."""
    path = folder / TOKENIZER_FILE
    return path if path.is_file() else None
