"""One object store, by its URI, as sources and destinations need it: conditional reads and writes, and errors that people can read.

Who may do what comes from the environment, as obstore reads it: AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL and the rest of
AWS_…, web identities, containers' and instances' metadata; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and the rest
of AZURE_…. Needs the extra `object-store`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from headrace.errors import ConfigError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MISSING = "{uri}: object stores need the package obstore: pip install 'headrace[object-store]'"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class StoreError(OSError):
    """A store that did not do what was asked. `strerror` is one line without addresses of requests: they may hold credentials."""

    def __init__(self, text: str) -> None:
        super().__init__(None, text)
        self.strerror = text

    def __str__(self) -> str:
        return str(self.strerror)


class Missing(StoreError):
    """No object of that name, or no bucket."""


class NotModified(StoreError):
    """A conditional read found what the reader has."""


class Conflict(StoreError):
    """A conditional write found something else than it expected."""


def public_uri(uri: str) -> str:
    """Without a password and what else signs a request."""
    return re.sub(r"//[^/@]*:[^/@]*@", "//", re.split(r"[?#]", uri, maxsplit=1)[0])


def open_store(uri: str) -> ObjectStore:
    """Asks nothing of the store yet. Raises ConfigError for a URI that names none."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise ConfigError(MISSING.format(uri=public_uri(uri))) from None
    # A store that is away is the caller's to try again: its polls are the long-term retries.
    retries = {
        "max_retries": 2,
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
        "retry_timeout": timedelta(seconds=15),
    }
    client = {
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=30),
        "timeout": timedelta(days=1),  # of a request as a whole: a large file takes its time
        "allow_http": uri.startswith("http://") or _is_on_loopback(),
    }
    if not client["allow_http"]:
        del client["allow_http"]  # False would override AWS_ALLOW_HTTP and its like
    try:
        return from_url(uri.rstrip("/"), client_options=client, retry_config=retries)  # type: ignore[call-overload,no-any-return]  # typed for literals
    except (BaseError, ValueError) as error:
        raise ConfigError(f"{public_uri(uri)}: {_first_words(str(error))}") from None


def _is_on_loopback() -> bool:
    """Whether S3 is to be found on this machine, where no TLS is needed: a gateway in the pod, a test."""
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
    host = urlsplit(endpoint).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def readable_errors(subject: str) -> Iterator[None]:
    """What obstore raises inside becomes StoreError that begins with `subject`."""
    from obstore import exceptions

    try:
        yield
    except exceptions.NotModifiedError:
        raise NotModified(f"{subject}: not modified") from None
    except (exceptions.PreconditionError, exceptions.AlreadyExistsError):
        raise Conflict(f"{subject}: changed meanwhile") from None
    except FileNotFoundError as error:
        raise Missing(f"{subject}: {_status(str(error)) or 'not found'}") from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StoreError(f"{subject}: no permission: {_status(str(error)) or 'check the credentials in the environment'}") from None
    except exceptions.BaseError as error:
        raise StoreError(f"{subject}: {_reason(str(error))}") from None
    except TimeoutError:
        raise StoreError(f"{subject}: no answer in time") from None


def _reason(text: str) -> str:
    """obstore has no kinds for these: the text is Rust's debug output, in which they are to be found."""
    if status := _status(text):
        return status
    kinds = {
        "kind: Connect": "no connection",
        "kind: Timeout": "no answer in time",
        "builder error": "plain http is not allowed: set AWS_ALLOW_HTTP=true",
    }
    return next((words for sign, words in kinds.items() if sign in text), _first_words(text))


def _status(text: str) -> str:
    """`404 Not Found: NoSuchBucket: The specified bucket does not exist`, as far as the store says it."""
    status = re.search(r"status code: (\d{3}(?: [A-Z][A-Za-z ]*)?)", text)
    if status is None:
        return ""
    body = [re.search(rf"<{tag}>([^<]{{1,200}})</{tag}>", text) for tag in ("Code", "Message")]
    return ": ".join([status[1].strip(), *(found[1] for found in body if found)])


def _first_words(text: str) -> str:
    """The first line, without addresses."""
    return re.sub(r"\w+://\S+", "…", text.split("\n", 1)[0])[:300]
