"""Which members of a tar make one sample, and which kinds of file a sample may have: WebDataset's key rule, made
strict."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

ALLOWED_EXTENSIONS = frozenset(
    (
        *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"),
        *("flac", "wav", "mp3", "ogg", "opus", "m4a", "mp4", "webm", "mkv", "mov"),
        *("txt", "json", "cls", "id", "csv", "tsv", "xml", "html", "md", "npy"),
    )
)
REFUSED_EXTENSIONS = frozenset(("pyd", "pickle", "pkl", "pth", "pt", "ckpt", "joblib", "dill"))
_EXAMPLES = 20


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (lower case) of a member: the key ends at the first dot of the base name. None for a name
    without a key or an extension, which every WebDataset reader passes over."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None
    return f"{folder}{slash}{stem}", extension.lower()


def is_metadata(name: str) -> bool:
    """Whether WebDataset passes over the member as metadata: its first part is ``__so__``."""
    first = name.partition("/")[0]
    return len(first) >= 4 and first.startswith("__") and first.endswith("__")


@functools.lru_cache(maxsize=1024)
def is_refused(extension: str) -> bool:
    """Whether a part of the extension stands for pickled Python objects."""
    return not REFUSED_EXTENSIONS.isdisjoint(extension.split("."))


def extension_problem(extension: str, allow: Collection[str] = ()) -> str | None:
    """What is wrong with an extension; None when its last part is of a known kind or the whole is in ``allow``."""
    if is_refused(extension):
        return f"holds pickled Python objects ({extension!r}), which run code when they are opened"
    if extension.rpartition(".")[2] in ALLOWED_EXTENSIONS or extension in allow:
        return None
    return f"has an unknown extension {extension!r}"


@dataclass
class Signatures:
    """How many samples have which extensions, with the first few of each. Numbered parts of a document
    (``000.jpg``) are left out: documents differ in them."""

    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    examples: dict[tuple[str, ...], list[tuple[str, int, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, extensions: Collection[str], shard: str, byte: int, key: str) -> None:
        """Count a sample whose first header is at ``byte`` of ``shard``."""
        signature = tuple(sorted(e for e in extensions if not e.partition(".")[0].isdigit()))
        self.counts[signature] += 1
        if len(self.examples[signature]) < _EXAMPLES:
            self.examples[signature].append((shard, byte, key))

    def merge(self, other: Signatures) -> None:
        """Add the counts of another shard."""
        self.counts.update(other.counts)
        for signature, examples in other.examples.items():
            mine = self.examples[signature]
            mine.extend(examples[: _EXAMPLES - len(mine)])

    def missing(self, optional: Collection[str] = ()) -> Iterator[tuple[str, int, str, str]]:
        """(shard, byte, key, problem) for samples without an extension that others have; for an extension that
        fewer than half have, the first sample that has it. ``optional`` extensions may be missing."""
        total = sum(self.counts.values())
        having: Counter[str] = Counter()
        for signature, count in self.counts.items():
            having.update(dict.fromkeys(signature, count))
        for extension, count in sorted(having.items()):
            if count == total or extension in optional:
                continue
            rare = 2 * count < total
            for signature, examples in self.examples.items():
                if (extension in signature) != rare:
                    continue
                for shard, byte, key in examples[:1] if rare else examples:
                    if rare:
                        problem = f"sample {key!r} has .{extension}, as only {count} of {total} samples do"
                    else:
                        problem = f"sample {key!r} has no .{extension}, as {count} of {total} samples do"
                    yield shard, byte, key, problem
                more = self.counts[signature] - len(examples)
                if more and not rare:
                    yield (*examples[-1], f"{more} more samples have no .{extension}")
