"""``pretrain checkpoint``: version 1 is read, checkpoints are rewritten and exported, damage and misuse are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from support.saving import save_by_ranks, whole

from launchers.exit_codes import ExitCode
from launchers.run_dir import RunDir
from pretrain import cli
from pretrain.checkpoint import convert as convert_module
from pretrain.checkpoint.convert import convert_checkpoint, export_weights
from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.manifest import CheckpointError, CorruptCheckpointError, Manifest
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore, verify
from pretrain.parallel.shard import Shard

TENSORS = {
    "master:a.weight": torch.randn(6, 8, generator=torch.Generator().manual_seed(1)),
    "exp_avg:a.weight": torch.randn(6, 8, generator=torch.Generator().manual_seed(2)),
    "weight:frozen": torch.tensor([1.5, -2.0, 4.0]).to(torch.bfloat16),
    "buffer:count": torch.tensor([3, 4]),
}
TRAINING = {"step": 7, "samples": 56, "tokens": 999, "world_size": 2, "callbacks": {}}


def split_checkpoint(root: Path) -> Path:
    """As two tensor-parallel ranks would write it: columns of the matrices, the rest on rank 0."""
    ranks: list[list[Fragment]] = [[], []]
    for key, tensor in TENSORS.items():
        slot, name = key.split(":")
        if tensor.ndim == 1:
            ranks[0].append(whole(name, slot, tensor))
            continue
        for rank, share in enumerate(tensor.chunk(2, dim=1)):
            shard = Shard.split((6, 8), 1, rank, 2)
            ranks[rank].append(Fragment(name, slot, (6, 8), 0, share.reshape(-1), shard))
    return save_by_ranks(root, 7, ranks, TRAINING)


def first_version(folder: Path) -> Path:
    """A checkpoint as releases with format version 1 wrote it, made by hand from its description."""
    folder.mkdir(parents=True)
    flat = {key: tensor.reshape(-1) for key, tensor in TENSORS.items()}
    save_file({f"{key}:0": values[:2].clone() for key, values in flat.items()}, folder / "rank_00000.safetensors")
    save_file(
        {f"{key}:2": values[2:].clone() for key, values in flat.items() if values.numel() > 2},
        folder / "rank_00001.safetensors",
    )
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.int64": "I64"}
    body: dict[str, Any] = {
        "format": "pretrain-canonical",
        "version": 1,
        "step": 7,
        "training": TRAINING,
        "files": {
            path.name: {"bytes": path.stat().st_size, "xxh3": xxhash.xxh3_128_hexdigest(path.read_bytes())}
            for path in sorted(folder.iterdir())
        },
        "tensors": {
            key: {
                "shape": list(tensor.shape),
                "dtype": names[str(tensor.dtype)],
                "fragments": [
                    ["rank_00000.safetensors", 0, 2],
                    *([["rank_00001.safetensors", 2, tensor.numel()]] if tensor.numel() > 2 else []),
                ],
            }
            for key, tensor in TENSORS.items()
        },
    }
    body["digest"] = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps(body, indent=1))
    return folder


def check_same(folder: Path) -> None:
    """Every tensor and the training state are those of the original, bit for bit."""
    reader = CheckpointReader(folder)
    assert {f"{slot}:{name}" for slot in reader.slots() for name in reader.names(slot)} == TENSORS.keys()
    for key, tensor in TENSORS.items():
        slot, name = key.split(":")
        assert torch.equal(reader.tensor(name, slot), tensor)
        assert reader.tensor(name, slot).dtype == tensor.dtype
    assert reader.training == TRAINING


def test_version_1_is_read_and_verified(tmp_path: Path) -> None:
    folder = first_version(tmp_path / "step_00000007")
    assert verify(folder).version == 1
    check_same(folder)
    shard = Shard.split((6, 8), 1, 3, 4)
    values = CheckpointReader(folder).read_shard("a.weight", "master", shard, 0, 12)
    assert torch.equal(values, TENSORS["master:a.weight"][:, 6:].reshape(-1))
    (folder / "rank_00001.safetensors").write_bytes((folder / "rank_00001.safetensors").read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"rank_00001\.safetensors: \d+ bytes, expected"):
        verify(folder)


@pytest.mark.parametrize("source", [split_checkpoint, lambda root: first_version(root / "step_00000007")])
@pytest.mark.parametrize(("version", "num_files"), [(2, 1), (2, 3), (1, 2), (2, 50)])
def test_conversion_keeps_every_bit(tmp_path: Path, source: Any, version: int, num_files: int) -> None:
    folder = source(tmp_path / "from")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    convert_checkpoint(folder, tmp_path / "to/step_00000007", version=version, num_files=num_files)
    manifest = verify(tmp_path / "to/step_00000007")
    assert (manifest.version, manifest.step) == (version, 7)
    assert len(manifest.files) == min(num_files, len(TENSORS))
    assert all(len(entry.fragments) == 1 for entry in manifest.tensors.values())
    check_same(tmp_path / "to/step_00000007")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [entry.name for entry in (tmp_path / "to").iterdir()] == ["step_00000007"]


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    tensor, put = CheckpointReader.tensor, convert_module.as_bytes
    monkeypatch.setattr(
        CheckpointReader, "tensor", lambda self, name, slot: order.append(f"read {name}") or tensor(self, name, slot)
    )
    monkeypatch.setattr(convert_module, "as_bytes", lambda values: order.append("write") or put(values))
    convert_checkpoint(split_checkpoint(tmp_path), tmp_path / "to")
    assert order == ["read count", "write", "read a.weight", "write", "read a.weight", "write", "read frozen", "write"]


def test_exported_weights_are_plain_safetensors(tmp_path: Path) -> None:
    folder = split_checkpoint(tmp_path / "from")
    expected = {key.split(":")[1]: value for key, value in TENSORS.items() if not key.startswith("exp_avg")}
    export_weights(folder, tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    stored = load_file(tmp_path / "one/model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(
        torch.equal(stored[name], expected[name]) and stored[name].shape == expected[name].shape for name in stored
    )

    export_weights(folder, tmp_path / "more", dtype="bf16", num_files=2)
    index = json.loads((tmp_path / "more/model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "more" / name) for name in sorted(set(index["weight_map"].values()))}
    assert list(files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    merged = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert merged.keys() == expected.keys()
    assert torch.equal(merged["a.weight"], TENSORS["master:a.weight"].to(torch.bfloat16))
    assert torch.equal(merged["count"], TENSORS["buffer:count"])  # integers stay what they are
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in merged.values())


def test_conversion_overwrites_nothing_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = split_checkpoint(tmp_path / "from")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    with pytest.raises(CheckpointError, match=r"(?s)files: 0, expected at least 1.*taken is not empty"):
        convert_checkpoint(folder, taken, num_files=0)
    with pytest.raises(CheckpointError, match="lies inside the checkpoint"):
        convert_checkpoint(folder, folder / "new")
    with pytest.raises(CheckpointError, match="named for step 8, the checkpoint is of step 7"):
        convert_checkpoint(folder, tmp_path / "step_00000008")
    verify(folder)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "write_safetensors", full)
    with pytest.raises(CheckpointError, match=r"nothing is left of it.*No space left"):
        convert_checkpoint(folder, tmp_path / "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["from", "taken"]


def test_a_damaged_source_is_not_converted(tmp_path: Path) -> None:
    folder = split_checkpoint(tmp_path / "from")
    with (folder / "rank_00001.safetensors").open("r+b") as stream:
        stream.seek(-3, 2)
        stream.write(b"\x55")
    with pytest.raises(CorruptCheckpointError, match=r"rank_00001\.safetensors: hash"):
        export_weights(folder, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with an old and a new checkpoint; its configuration plays no part here."""
    path = tmp_path / "run"
    path.mkdir()
    run = RunDir(path)
    monkeypatch.setattr(RunDir, "open", classmethod(lambda cls, path: run))
    shutil.copytree(split_checkpoint(tmp_path / "new"), run.checkpoints_path / "step_00000007")
    older = first_version(run.checkpoints_path / "step_00000003")
    body = json.loads((older / "manifest.json").read_text()) | {"step": 3}
    del body["digest"]
    body["digest"] = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    (older / "manifest.json").write_text(json.dumps(body))
    CheckpointStore(run.checkpoints_path).record_score(3, 2.25)
    return path


def test_list_and_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "list", str(run_dir)]) == ExitCode.FINISHED
    old, new = capsys.readouterr().out.splitlines()
    assert old.startswith("step_00000003 ")
    assert old.endswith("written by 2 processes  validation loss 2.2500")
    assert new.endswith("(latest)")
    assert cli.main(["checkpoint", "verify", str(run_dir)]) == ExitCode.FINISHED
    assert capsys.readouterr().out.count("  intact  ") == 2
    (run_dir / "checkpoints/step_00000003/rank_00001.safetensors").unlink()
    assert cli.main(["checkpoint", "verify", str(run_dir)]) == ExitCode.CORRUPTED_CHECKPOINT
    assert "step_00000003  DAMAGED" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", str(run_dir), "--step", "7"]) == ExitCode.FINISHED
    assert (
        cli.main(["checkpoint", "verify", str(run_dir / "checkpoints/step_00000003")]) == ExitCode.CORRUPTED_CHECKPOINT
    )
    assert cli.main(["checkpoint", "inspect", str(run_dir), "--step", "5"]) == ExitCode.INVALID_INPUT
    assert "existing: step_00000003, step_00000007" in capsys.readouterr().err


def test_inspect(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "inspect", str(run_dir), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step_00000007  format version 2, ")
    assert "tokens             999" in out
    assert ["master", "1", "48", "2", "F32"] in [line.split() for line in out.splitlines()]
    assert "master:a.weight  [6, 8]  F32  rank_00000.safetensors[0:24] of columns 0:4 of 8, rank_00001" in out
    folder = run_dir / "checkpoints/step_00000003"
    assert cli.main(["checkpoint", "inspect", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("step_00000003  format version 1, ")
    (folder / "manifest.json").unlink()
    assert cli.main(["checkpoint", "inspect", str(folder)]) == ExitCode.CORRUPTED_CHECKPOINT
    assert "manifest.json is missing" in capsys.readouterr().err


def test_convert(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "out")
    assert cli.main(["checkpoint", "convert", str(run_dir), target, "--step", "3", "--dtype", "bf16"]) == 2
    assert cli.main(["checkpoint", "convert", str(run_dir), target, "--version", "9", "--weights-only"]) == 2
    errors = capsys.readouterr().err
    assert "--dtype needs --weights-only" in errors
    assert "--version 9: this release writes 1 and 2" in errors
    assert "--version does not go with --weights-only" in errors
    assert cli.main(["checkpoint", "convert", str(run_dir), target, "--step", "3"]) == 0
    assert Manifest.load(Path(target)).version == 2
    check_same(Path(target))
    assert cli.main(["checkpoint", "convert", str(run_dir), target, "--weights-only"]) == 2
    weights = str(tmp_path / "weights")
    assert cli.main(["checkpoint", "convert", target, weights, "--weights-only", "--dtype", "bf16"]) == 0
    assert load_file(f"{weights}/model.safetensors")["a.weight"].dtype == torch.bfloat16
