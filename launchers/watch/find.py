"""Finding run directories: all of a folder, or the one that a user means. Torch-free."""

from __future__ import annotations

from pathlib import Path

from launchers.run_dir import RunDir, RunDirectoryError


def find_runs(root: Path) -> list[Path]:
    """Run directories: ``root`` itself if it is one, else those directly below it. Raises RunDirectoryError."""
    if (root / "config.yaml").is_file():
        return [root]
    try:
        return sorted(child for child in root.iterdir() if (child / "config.yaml").is_file())
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{root}: no such folder; expected the folder that holds run directories (run.root); "
            "name it, or start a run first"
        ) from error
    except OSError as error:
        raise RunDirectoryError(f"{root}: cannot be listed ({error.strerror}); name a folder you may read") from error


def resolve_run(name: str, root: str | Path) -> Path:
    """The run directory that a user means: a path, or a name or unique beginning of a name below ``root``.

    Raises RunDirectoryError that names what fits, or what there is.
    """
    direct = Path(name)
    if (direct / "config.yaml").is_file():
        return direct.absolute()
    folder = Path(root)
    names = [path.name for path in find_runs(folder)] if folder.is_dir() else []
    if name in names:
        return (folder / name).absolute()
    fitting = [candidate for candidate in names if candidate.startswith(name)]
    if len(fitting) == 1:
        return (folder / fitting[0]).absolute()
    if fitting:
        raise RunDirectoryError(
            f"{name}: {len(fitting)} runs in {folder} begin so: {', '.join(fitting[-8:])}; give more of the name"
        )
    if direct.exists():
        RunDir.open(direct)  # says what the folder lacks
    known = f"; runs there: {', '.join(names[-8:])}" if names else "; there are no runs"
    raise RunDirectoryError(
        f"{name}: neither a run directory nor the beginning of a run's name in {folder}{known}. "
        "Give its path, or --root with the folder that holds it"
    )
