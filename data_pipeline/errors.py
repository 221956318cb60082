"""Errors of the data pipeline. All are the user's to solve, so each message says what, where and the way
out."""

from __future__ import annotations


class DamagedDataError(ValueError):
    """A shard, sidecar or manifest does not hold what was written: names the file, the byte or member, the
    remedy.

    ``shard``, ``member`` and ``byte`` say the same as the message, for programs; each is None where it does
    not apply.
    """

    def __init__(
        self, message: str, *, shard: str | None = None, member: str | None = None, byte: int | None = None
    ) -> None:
        super().__init__(message)
        self.shard, self.member, self.byte = shard, member, byte


class MissingDataError(DamagedDataError):
    """A file of the dataset is not there or may not be read (404, 403, no such file): names its URL or path.
    Trying again cannot help."""


class FetchError(OSError):
    """A download failed for good: names the URL, the last cause, and how many attempts in how many seconds
    were made."""

    def __init__(self, message: str, *, url: str | None = None, attempts: int = 0, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.url, self.attempts, self.seconds = url, attempts, seconds


class DatasetExistsError(ValueError):
    """The output folder already holds something else; nothing was written."""
