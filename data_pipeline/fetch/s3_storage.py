"""Files below an S3 prefix, by range requests (obstore: a native client that leaves the interpreter lock free).

The client cannot be used in a forked child of a process that used it: the error says so, where the client itself would
hang. Its requests end by their timeouts only, and it does not tell a server's Retry-After.
"""

from __future__ import annotations

import configparser
import os
import re
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.fetch.remote import Answer, RemoteStorage, refused, status_error
from data_pipeline.fetch.retry import Retry, TransientError
from data_pipeline.fetch.settings import FetchSettings

_STATUS = re.compile(r"status code: (\d{3})")
_REASONS = {400: "Bad Request", 408: "Request Timeout", 429: "Too Many Requests", 500: "Internal Server Error"}
_REASONS |= {502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}
# What the client's error text holds -> our words, and whether it may heal. The first that fits counts.
_CAUSES = (
    ("NotPartial", "the server ignores byte ranges", False),
    ("BareRedirect", "the server redirects elsewhere; the region is probably wrong", False),
    ("UnexpectedRange", "the server sent other bytes than asked for", True),
    ("certificate", "the server's certificate was refused", False),
    ("dns error", "its host name could not be resolved", True),
    ("kind: Timeout", "no data in time", True),
    ("kind: Connect,", "the host cannot be reached or refused the connection", True),
    ("IncompleteBody", "the body ended early", True),
    ("kind: Interrupted", "the connection was broken", True),
    ("HTTP error", "the connection was broken", True),
)

# Without credentials the client asks the cloud's metadata service, which elsewhere is not there.
_METADATA_HOST = "169.254."
_NO_CREDENTIALS = "no credentials were found (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or s3_anonymous)"

_client_process: int | None = None


class S3Storage(RemoteStorage):
    """Objects below ``s3://BUCKET/PREFIX``.

    End point, region and credentials come from the settings, else from ``AWS_*`` variables, else from the shared
    credentials and config files. Raises ValueError when the URL names no bucket.
    """

    def __init__(self, url: str, settings: FetchSettings, retry: Callable[..., Retry] = Retry) -> None:
        parts = urlsplit(url)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        if not self._bucket or parts.query or parts.fragment:
            raise ValueError(f"{url}: is no S3 location. What to do: write s3://BUCKET/PREFIX.")
        super().__init__(f"s3://{self._bucket}/{self._prefix}".rstrip("/"), settings, retry)
        self._store: Any = None
        self._lock = threading.Lock()

    def file_url(self, name: str) -> str:
        """See :meth:`RemoteStorage.file_url`."""
        return f"{self.url}/{name}"

    def after_fork(self) -> None:
        """A child needs a client of its own."""
        super().after_fork()
        self._lock = threading.Lock()
        self._store = None

    def request(self, name: str, start: int, stop: int, cancelled: threading.Event | None) -> Answer:
        """See :meth:`RemoteStorage.request`."""
        import obstore
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            store = self._client(name)
            result = obstore.get(store, name, options={"range": (start, stop)})
            total = result.meta["size"]
            data = result.bytes().to_bytes()
        except FileNotFoundError:
            raise status_error(self.file_url(name), name, 404, "") from None
        except PermissionDeniedError:
            raise status_error(self.file_url(name), name, 403, "") from None
        except UnauthenticatedError:
            raise status_error(self.file_url(name), name, 401, "") from None
        except BaseError as error:
            if _status(error) == 416:  # the file ends before these bytes; ask how long it is
                return Answer([], self._head(store, name))
            raise self._failure(error, name) from error
        if len(data) < min(stop, total) - start:
            raise TransientError("the body ended early")
        return Answer([data], total)

    def _head(self, store: Any, name: str) -> int:
        import obstore
        from obstore.exceptions import BaseError

        try:
            return int(obstore.head(store, name)["size"])
        except BaseError as error:
            raise self._failure(error, name) from error

    def _failure(self, error: Exception, name: str) -> Exception:
        url, status, text = self.file_url(name), _status(error), str(error)
        if _METADATA_HOST in text and (status is None or status < 429):
            return refused(url, _NO_CREDENTIALS)
        if status is not None:
            return status_error(url, name, status, _REASONS.get(status, ""))
        for part, cause, heals in _CAUSES:
            if part in text:
                return TransientError(cause) if heals else refused(url, cause)
        # Times and ports would differ from rank to rank; the kind of error does not.
        return refused(url, f"{type(error).__name__} of the S3 client")

    def _client(self, name: str) -> Any:
        global _client_process
        from obstore.store import S3Store

        if _client_process not in (None, os.getpid()):
            raise refused(
                self.file_url(name),
                "S3 was used before this process was forked, which its client does not survive (use the 'spawn' or "
                "'forkserver' start method for worker processes)",
            )
        with self._lock:
            _client_process = os.getpid()
            if self._store is None:
                self._store = S3Store(self._bucket, prefix=self._prefix or None, **client_options(self.settings))
            return self._store


def client_options(settings: FetchSettings, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Options of the client: settings first, then what the client itself does not look for (``AWS_ENDPOINT_URL_S3``,
    ``AWS_CA_BUNDLE``, profile files). Other ``AWS_*`` variables it reads."""
    endpoint = settings.s3_endpoint or environment.get("AWS_ENDPOINT_URL_S3")
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=settings.connect_timeout_s),
        "read_timeout": timedelta(seconds=settings.read_timeout_s),
        "timeout": timedelta(seconds=settings.deadline_s),
    }
    shown = endpoint or environment.get("AWS_ENDPOINT_URL") or environment.get("AWS_ENDPOINT") or ""
    if shown.startswith("http://"):
        client["allow_http"] = True
    bundle = settings.ca_bundle or environment.get("AWS_CA_BUNDLE")
    if bundle:
        client["root_certificate"] = Path(bundle).read_bytes()
    options: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": 0}}
    profile = _profile(environment)
    wanted = {
        "endpoint": endpoint,
        "region": settings.s3_region,
        "access_key_id": settings.s3_access_key_id,
        "secret_access_key": settings.s3_secret_access_key,
        "session_token": settings.s3_session_token,
    }
    if not any(environment.get(key) for key in ("AWS_REGION", "AWS_DEFAULT_REGION")):
        wanted["region"] = wanted["region"] or profile.get("region")
    if settings.s3_anonymous:
        options["skip_signature"] = True
    elif wanted["access_key_id"] is None and not environment.get("AWS_ACCESS_KEY_ID"):
        wanted |= {
            "access_key_id": profile.get("aws_access_key_id"),
            "secret_access_key": profile.get("aws_secret_access_key"),
            "session_token": profile.get("aws_session_token"),
        }
    return options | {key: value for key, value in wanted.items() if value is not None}


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """Values of the user's profile in ``~/.aws/config`` and ``~/.aws/credentials``; empty without these files."""
    name = environment.get("AWS_PROFILE", "default")
    home = Path(environment.get("HOME", "~")).expanduser() / ".aws"
    values: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(environment.get(variable) or home / file)
        if parser.has_section(section):
            values |= dict(parser[section])
    return values


def _status(error: Exception) -> int | None:
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None
