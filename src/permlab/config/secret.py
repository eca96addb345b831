"""Secrets that must not reach a file or a log: known from the environment, or by their shape."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Names of environment variables and settings whose value is nobody's business.
NAME = re.compile(r"(^|[_.-])(api_?key|key|token|secret|password|passwd|credentials?)($|[_.-])", re.IGNORECASE)
# Tokens of Hugging Face, of GitHub, and of W&B since it has prefixed them.
SHAPE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|wandb_v1_[A-Za-z0-9_]{20,})")
# What is given to a setting that is named like a secret, in whatever is printed.
NAMED = re.compile(r"((?:^|[\s._-])(?:api_?key|token|secret|password|passwd|credentials?)=)[^\s;:,<]+", re.IGNORECASE)
# Shorter values of such variables are flags (`TOKEN=1`), and would be found everywhere.
MIN_LENGTH = 8
HIDDEN = "<secret>"


def redact(text: str) -> str:
    """The text without secrets.

    Example:
        >>> redact("hf_0123456789abcdefghij and logger.api_key=abc")
        '<secret> and logger.api_key=<secret>'
    """
    return _redact(text, _from_environment())


def _redact(text: str, secrets: Sequence[str]) -> str:
    for value in secrets:
        text = text.replace(value, HIDDEN)
    return NAMED.sub(rf"\1{HIDDEN}", SHAPE.sub(HIDDEN, text))


def holds_secret(text: str) -> bool:
    return redact(text) != text


def leaks(value: Any) -> Iterator[str]:
    """Dotted keys of a configuration whose name or value holds a secret."""
    return _leaks(value, "", _from_environment())


def _leaks(value: Any, path: str, secrets: Sequence[str]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if _redact(str(key), secrets) != str(key):
                yield path or "the configuration"
            yield from _leaks(part, f"{path}.{key}" if path else str(key), secrets)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaks(part, path, secrets)
    elif isinstance(value, str) and _redact(value, secrets) != value:
        yield path


def _from_environment() -> list[str]:
    found = {value for name, value in os.environ.items() if NAME.search(name) and len(value) >= MIN_LENGTH}
    return sorted(found, key=len, reverse=True)  # one may be part of another
