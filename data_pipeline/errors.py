"""Errors of the data pipeline. All are the user's to solve, so each message says what, where and the way
out."""

from __future__ import annotations


class DamagedDataError(ValueError):
    """A shard, sidecar or manifest does not hold what was written: names the file, the byte or member, the
    remedy."""


class DatasetExistsError(ValueError):
    """The output folder already holds something else; nothing was written."""
