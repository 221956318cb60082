"""How remote files are asked for: timeouts, retries, parts, the cap on requests, S3 access."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_POSITIVE = (
    "connect_timeout_s",
    "read_timeout_s",
    "deadline_s",
    "attempts",
    "part_bytes",
    "requests_per_node",
)


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """Settings of the remote storages; local folders use only the retry part.

    ``read_timeout_s`` is the longest silence of a server, ``deadline_s`` the longest time for one request with
    all its retries. Waits between attempts grow from ``first_wait_s`` to ``longest_wait_s`` (full jitter).
    A read longer than ``part_bytes`` is fetched in parts at once. ``requests_per_node`` caps the requests in
    flight of all processes on a node: each takes an equal share, at least one. ``processes_per_node`` None
    takes the number from the Slurm variables, or 1.

    S3 fields left out come from the usual ``AWS_*`` variables and the shared credentials file. ``ca_bundle``
    is a PEM file of further certificate authorities.

    Raises ValueError with every setting that cannot be.
    """

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    deadline_s: float = 300.0
    attempts: int = 12
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    part_bytes: int = 8 << 20
    requests_per_node: int = 64
    processes_per_node: int | None = None
    ca_bundle: str | None = None
    s3_endpoint: str | None = None
    s3_region: str | None = None
    s3_anonymous: bool = False
    s3_access_key_id: str | None = field(default=None, repr=False)
    s3_secret_access_key: str | None = field(default=None, repr=False)
    s3_session_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}, but must be above 0" for name in _POSITIVE if not getattr(self, name) > 0
        ]
        faults += [
            f"{name} is {getattr(self, name)}, but must not be negative"
            for name in ("first_wait_s", "longest_wait_s")
            if not getattr(self, name) >= 0
        ]
        if self.processes_per_node is not None and self.processes_per_node < 1:
            faults.append(f"processes_per_node is {self.processes_per_node}, but must be above 0")
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            faults.append("s3_access_key_id and s3_secret_access_key must be given together")
        if faults:
            raise ValueError("Fetch settings: " + "; ".join(faults) + ". What to do: correct or leave them out.")

    def requests_in_flight(self, environment: Mapping[str, str] = os.environ) -> int:
        """This process's share of ``requests_per_node``."""
        processes = self.processes_per_node or _processes_per_node(environment)
        return max(1, self.requests_per_node // processes)


def _processes_per_node(environment: Mapping[str, str]) -> int:
    """Tasks on one node as Slurm tells (``8``, or ``8(x2),7``: the first is the largest), else 1."""
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        match = re.match(r"[1-9]\d*", environment.get(name, ""))
        if match:
            return int(match.group())
    return 1
