"""API keys: what a key looks like, how it is kept, and who sends it.

Only SHA-256 hashes of keys are kept. A slow password hash would gain nothing: a key is 256 random bits, so nobody
can try candidates until one fits, and a slow hash on every request would be a way to keep the worker busy.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_PREFIX = "t2w_"  # lets secret scanners recognise a key
_SECRET_BYTES = 32
_ENTRY = re.compile(r"([A-Za-z0-9._-]{1,32}):([0-9a-f]{64})")
# Names are labels of metrics.
MAX_KEYS = 256
_MAX_FILE_BYTES = 64 * 1024
RELOAD_CHECK_S = 1.0


class KeysError(Exception):
    """The keys cannot be used as they are configured."""


@dataclass(frozen=True)
class ApiKey:
    """One key: its name for people, and the SHA-256 of what clients send."""

    name: str
    digest: bytes


def create_key(name: str) -> tuple[str, str]:
    """Make a new random key.

    Returns:
        the key itself, for the client, and its entry `NAME:SHA256`, for the service.

    Raises:
        KeysError: the name cannot be used.
    """
    secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    entry = f"{name}:{_digest(secret.encode()).hex()}"
    parse_keys(entry, "the new key")
    return secret, entry


def parse_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """Read entries `NAME:SHA256`, separated by white space or commas; a `#` comments out the rest of its line.

    Two entries may share a name, so that a client can move from one key to the next.

    Args:
        text: the entries.
        source: where they come from, for the error.

    Raises:
        KeysError: an entry of another form, or too many. It never repeats the entry, which may be a key.
    """
    entries = re.sub(r"#.*", "", text).replace(",", " ").split()
    _check_number(len(entries), source)
    keys = []
    for number, entry in enumerate(entries, start=1):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise KeysError(
                f"{source}: entry {number} is not NAME:SHA256 with a name of 1 to 32 characters of A-Z a-z 0-9 . _ - "
                "and 64 hexadecimal digits; `t2w key NAME` prints one"
            )
        keys.append(ApiKey(match[1], bytes.fromhex(match[2])))
    return tuple(keys)


class KeyRing:
    """The keys of one worker. Those of a file follow the file, at most a second behind."""

    def __init__(self, keys: str | None, file: str | None, forget: Callable[[str], None] = lambda _: None) -> None:
        """Read the keys.

        Args:
            keys: entries as `parse_keys` reads them.
            file: path of a file of such entries.
            forget: called with each name that has no key any more.

        Raises:
            KeysError: they cannot be read, there are none, or both sources together hold too many.
        """
        self._forget = forget
        self._fixed = parse_keys(keys, "T2W_API_KEYS") if keys is not None else ()
        self._path = Path(file) if file is not None else None
        self._signature: tuple[int, ...] = ()
        self._from_file: tuple[ApiKey, ...] = ()
        self._next_check = 0.0
        self._trouble = ""
        if self._path is not None:
            self._signature = _signature(self._path)
            self._from_file = self._read(self._path)
        self.required = keys is not None or file is not None
        if self.required and not self._fixed and not self._from_file:
            raise KeysError("T2W_API_KEYS and T2W_API_KEYS_FILE hold no key; `t2w key NAME` makes one")

    def name_of(self, secret: bytes) -> str | None:
        """The name of the key that a client sent, or None where it is not one."""
        self._follow_file()
        digest = _digest(secret)
        found = None
        # Every key is compared, each in constant time: how long it takes tells nothing about the keys.
        for key in (*self._fixed, *self._from_file):
            if hmac.compare_digest(key.digest, digest):
                found = key.name
        return found

    def _follow_file(self) -> None:
        if self._path is None or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + RELOAD_CHECK_S
        try:
            signature = _signature(self._path)
            if signature == self._signature:
                return
            self._signature = signature
            before, self._from_file = self._from_file, self._read(self._path)
        except KeysError as error:  # a file that is being replaced must not lock everybody out
            if self._trouble != str(error):
                log.error("keys not reloaded, the old ones stay valid", error=str(error))
            self._trouble = str(error)
            self._signature = ()
            return
        self._trouble = ""
        log.info("keys reloaded", keys=len(self._from_file))
        for name in {key.name for key in before} - {key.name for key in (*self._fixed, *self._from_file)}:
            self._forget(name)

    def _read(self, path: Path) -> tuple[ApiKey, ...]:
        keys = _read(path)
        _check_number(len(self._fixed) + len(keys), f"T2W_API_KEYS and T2W_API_KEYS_FILE {path}")
        return keys


def bearer_secret(authorization: Sequence[bytes]) -> bytes | None:
    """What a client sent as `Authorization: Bearer KEY`, or None where that is not exactly what it sent."""
    if len(authorization) != 1:
        return None
    scheme, _, secret = authorization[0].partition(b" ")
    return secret.strip() if scheme.lower() == b"bearer" and secret.strip() else None


def check_exposure(host: str, *, keys: bool, allow_anonymous: bool) -> None:
    """Refuse to let strangers in by accident.

    Raises:
        KeysError: other machines can reach the service, no key is set, and nobody said that this is wanted.
    """
    if keys or allow_anonymous or _is_loopback(host):
        return
    raise KeysError(
        f"{host} can be reached from other machines and no key is set: set T2W_API_KEYS or T2W_API_KEYS_FILE "
        "(`t2w key NAME` makes a key), or T2W_ALLOW_ANONYMOUS=true to serve everybody"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_number(keys: int, source: str) -> None:
    if keys > MAX_KEYS:
        raise KeysError(f"{source}: {keys} keys given, at most {MAX_KEYS} are allowed")


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _signature(path: Path) -> tuple[int, ...]:
    """Changes when the file does, also when a symbolic link on the way to it is swapped, as Kubernetes does."""
    try:
        status = path.stat()
    except OSError as error:
        raise KeysError(f"T2W_API_KEYS_FILE {path} cannot be read: {os.strerror(error.errno or 0)}") from None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        text = content.decode("ascii")
    except OSError as error:
        raise KeysError(f"T2W_API_KEYS_FILE {path} cannot be read: {os.strerror(error.errno or 0)}") from None
    except UnicodeDecodeError:
        raise KeysError(f"T2W_API_KEYS_FILE {path} is not plain ASCII text") from None
    if len(content) > _MAX_FILE_BYTES:
        raise KeysError(f"T2W_API_KEYS_FILE {path} has more than {_MAX_FILE_BYTES} bytes")
    return parse_keys(text, f"T2W_API_KEYS_FILE {path}")
