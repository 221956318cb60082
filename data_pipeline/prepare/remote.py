"""Inputs behind fsspec URLs. Local paths never come here, so that they need no fsspec."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

_WEB = ("http", "https")


@dataclass(frozen=True)
class Found:
    """A listed file: ``name`` relative to its source, ``size`` -1 when unknown, ``ns`` its local time of
    change; ``seekable`` unless its server only sends it whole."""

    name: str
    location: str
    size: int
    version: str
    ns: int = 0
    seekable: bool = True


def is_url(source: str) -> bool:
    """Whether ``source`` names a protocol (``s3://``, ``https://``, ``memory://``)."""
    return "://" in source


def list_files(source: str, pattern: str) -> list[Found]:
    """Files of a URL: the file itself, those below a folder that match ``pattern``, or those a glob matches.

    Raises ValueError, naming the URL, when it cannot be listed or matches nothing.
    """
    import fsspec

    protocol = source.split("://", 1)[0]
    web = protocol in _WEB
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        # In a web address "?" and "[" are not a glob.
        if "*" in path or (not web and set(path) & set("?[")):
            root = path[: min(path.find(c) for c in "*?[" if c in path)].rpartition("/")[0]
            entries = [entry for entry in filesystem.glob(path, detail=True).values() if entry["type"] == "file"]
        else:
            entry = filesystem.info(path)
            if web or entry["type"] == "file":
                entries, root = [{**entry, "name": path}], path.rpartition("/")[0]
            else:
                root = path.rstrip("/")
                entries = [e for e in filesystem.find(root, detail=True).values() if _matches(e["name"], root, pattern)]
    except Exception as error:  # each file system has its own errors
        raise ValueError(
            f"{source} cannot be listed: {type(error).__name__}: {error}. "
            "What to do: check the URL and the access to it."
        ) from None
    if not entries:
        raise ValueError(f"{source} has no file that matches. What to do: check the URL, or give another --pattern.")
    return [_found(filesystem, entry, root) for entry in sorted(entries, key=lambda entry: str(entry["name"]))]


def open_url(url: str, seekable: bool) -> BinaryIO:
    """A stream of the bytes at ``url`` as they lie there; raises what the file system raises."""
    import fsspec

    streaming = {} if seekable else {"block_size": 0}
    return cast(BinaryIO, fsspec.open(url, "rb", compression=None, **streaming).open())


def _matches(name: str, root: str, pattern: str) -> bool:
    relative = name.removeprefix(root).lstrip("/")
    hidden = any(part.startswith(".") for part in relative.split("/"))
    return not hidden and re.fullmatch(_as_regex(pattern), relative) is not None


def _as_regex(pattern: str) -> str:
    """As in pathlib's glob: ``*`` and ``?`` stay within a folder, ``**/`` goes through any number of them."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.sub(r"\*\*/|\*\*|\*|\?|[^*?]+", lambda m: pieces.get(m[0]) or re.escape(m[0]), pattern)


def _found(filesystem: Any, entry: dict[str, Any], root: str) -> Found:
    name = str(entry["name"])
    marks = [
        str(entry[field]) for field in ("ETag", "etag", "LastModified", "mtime", "last_modified") if field in entry
    ]
    size = -1 if entry.get("size") is None else int(entry["size"])
    relative = name.removeprefix(root).lstrip("/") or os.path.basename(name)
    url = name if is_url(name) else filesystem.unstrip_protocol(name)
    seekable = url.split("://")[0] not in _WEB or bool(entry.get("partial"))
    return Found(relative, url, size, ":".join(["seen", *marks]), seekable=seekable)
