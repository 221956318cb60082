"""A package with components of a user's, made on the spot, and a tree that uses it."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "components_of_a_user"
PARTS = f"{PACKAGE}.parts"

SOURCE = '''
from dataclasses import dataclass, field
from typing import Any, ClassVar

@dataclass(frozen=True, kw_only=True)
class Data:
    path_fields: ClassVar[tuple[str, ...]] = ("path", "extra_paths")
    path: str = "set"
    extra_paths: list[str] = field(default_factory=list)
    sequence_length: int = 64
    vocab_size: int = 256
    read_ahead: int = field(default=2, metadata={"extendable": True})

    def violations(self):
        if self.path.endswith("broken"):
            yield "path", self.path, "must hold a data set", "prepare it"

    def build(self, seed: int) -> str:
        return f"{self.path} with seed {seed}"

@dataclass(frozen=True)
class UnpreparedData(Data):
    @property
    def vocab(self): ...
    def __getattribute__(self, name):
        if name == "vocab_size":
            raise ValueError("no manifest")
        return object.__getattribute__(self, name)

@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 1
    scale: float = 1.0

@dataclass(frozen=True, kw_only=True)
class Model:
    width: int
    vocab_size: int = 256
    max_sequence_length: int | None = 128
    inner: Inner = Inner()

    def __post_init__(self):
        if self.width == 13:
            raise ValueError("13 brings bad luck")

    def build(self, layers: Any) -> str:
        return f"model of width {self.width} from {layers}"

class Module:
    """No config class: configured by its signature."""
    def __init__(self, width: int, vocab_size: int = 256, *, gain: float = 1.0):
        self.width, self.vocab_size, self.gain = width, vocab_size, gain

def open_ended(width: int, **options):
    return width, options

def objective(z_loss: float = 0.0):
    return ("objective", z_loss)

NOT_CALLABLE = 3
'''


@pytest.fixture(scope="session")
def package_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("import path")
    (folder / PACKAGE).mkdir()
    (folder / PACKAGE / "__init__.py").write_text("")
    (folder / PACKAGE / "parts.py").write_text(textwrap.dedent(SOURCE))
    (folder / PACKAGE / "needs_missing.py").write_text("import a_package_nobody_has\n")
    (folder / PACKAGE / "raises.py").write_text("raise RuntimeError('no license')\n")
    return str(folder)


@pytest.fixture
def make_tree(package_folder: str) -> Callable[..., dict[str, Any]]:
    """A valid tree; keyword ``a__b=value`` sets ``a.b``."""
    base: dict[str, Any] = {
        "run": {"name": "t", "import_paths": [package_folder]},
        "train": {},
        "model": {"_target_": f"{PACKAGE}.parts.Model", "width": 8},
        "data": {"_target_": f"{PACKAGE}.parts.Data"},
        "objective": {"_target_": f"{PACKAGE}.parts.objective"},
        "optimizer": {"schedule": {}},
        "engine": {},
        "launcher": {},
        "tracking": {},
    }

    def make(**changes: Any) -> dict[str, Any]:
        tree = copy.deepcopy(base)
        for path, value in changes.items():
            *parents, name = path.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = value
        return tree

    return make


@pytest.fixture
def config_dir(tmp_path: Path, package_folder: str) -> str:
    """A folder of a user's, with blanks and a quote in its name."""
    folder = tmp_path / "it's mine"
    for group in ("model", "data", "experiment", "launcher"):
        (folder / group).mkdir(parents=True)
    (folder / "model/mine.yaml").write_text(f"_target_: {PARTS}.Model\nwidth: 8\nvocab_size: 4096\n")
    (folder / "data/mine.yaml").write_text(f"_target_: {PARTS}.Data\npath: set\nvocab_size: ${{model.vocab_size}}\n")
    (folder / "launcher/local.yaml").write_text("num_processes: 4\n")
    (folder / "experiment/mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /model: mine\n  - override /data: mine\n"
        f"run:\n  name: mine\n  import_paths: [{package_folder!r}]\n"
        "model:\n  width: 16\n"
    )
    return str(folder)


@pytest.fixture
def hybrid_tree(make_tree: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Like ``make_tree``, with our own model of four layers, which every engine can train."""
    model = {
        "_target_": "pretrain.models.hybrid.config.HybridConfig",
        "pattern": "M-*-",
        "width": 32,
        "vocab_size": 256,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "mamba2": {"head_dim": 16, "state_dim": 16, "groups": 2},
    }
    return lambda **changes: make_tree(**{"model": dict(model), **changes})
