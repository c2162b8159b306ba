"""The package's errors: one root, a few user-facing kinds.

A message says what is wrong, where (file, field, tile), the value seen, the value expected and how to
mend it. The command line prints the message alone, without a traceback, and leaves with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class SatDiFuserError(Exception):
    """Root of all errors this package raises on purpose."""

    exit_code = 1


class SettingsError(SatDiFuserError, ValueError):
    """A setting is unknown, missing or out of range."""

    exit_code = 2


class SourceError(SatDiFuserError, ValueError):
    """A source of tiles cannot be listed, or contradicts itself."""


class ImageError(SourceError):
    """One image or mask cannot be used; ``on_error: skip`` leaves its tile out."""


class LabelError(SatDiFuserError, ValueError):
    """Labels cannot be read or placed, miss the tiles, or name classes that nobody knows."""


class BackboneError(SatDiFuserError, ValueError):
    """A backbone folder is incomplete, or does not fit the request."""


class DeviceError(SatDiFuserError, RuntimeError):
    """The device lacks the memory for what is asked of it."""


class ClusterError(SatDiFuserError, RuntimeError):
    """Workers cannot be reached, do not fit, or fail for reasons of their own."""


class FeatureError(SatDiFuserError, ArithmeticError):
    """A feature value cannot be stored: not finite, or beyond the encoding's range."""


class StoreError(SatDiFuserError, RuntimeError):
    """A feature store is missing, incomplete, damaged or made with other settings."""


class LockedError(StoreError):
    """Another process writes to the store."""


class UnreachableError(StoreError):
    """A remote place does not answer, or refuses; that says nothing of the store."""


class RunError(SatDiFuserError, RuntimeError):
    """A fitted run is missing, or does not fit the store it is used on."""


class MapError(SatDiFuserError, OSError):
    """A map or a page cannot be written."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Name the nearest known words: ``"; did you mean a, b?"``, or nothing.

    Args:
        name: What the user wrote.
        known: What would have been accepted.
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def explain_settings(
    error: ValidationError,
    raw: Mapping[str, Any],
    origin: Callable[[list[str]], str],
    known: Callable[[], set[str]],
) -> str:
    """Tell every wrong setting with its rules, under what it stands in.

    Args:
        error: What pydantic found.
        raw: The nested settings it looked at.
        origin: Says where a setting stands, such as a file, by its keys.
        known: Names of all settings, to suggest near ones.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for item in error.errors():
        path = [str(key) for key in _user_path(item["loc"], raw)]
        named = [*path, "kind"] if item["type"] == "union_tag_invalid" else path
        settings = found.setdefault(origin(named), {})
        settings.setdefault(f"{'.'.join(path)}{_shown(item)}", []).append(_rule(item, known))
    return "\n".join(_block(origin, settings) for origin, settings in found.items())


def _block(origin: str, settings: Mapping[str, Sequence[str]]) -> str:
    count = "1 setting is" if len(settings) == 1 else f"{len(settings)} settings are"
    lines = [f"  {setting}: {' or '.join(dict.fromkeys(rules))}" for setting, rules in settings.items()]
    return "\n".join([f"{origin}: {count} wrong", *lines])


def _shown(item: Any) -> str:
    """The value seen; a section is too long to show, its rule says what is wrong in it."""
    if item["type"] == "union_tag_invalid":
        return f".kind = {item['ctx']['tag']!r}"
    return "" if item["type"] == "missing" or isinstance(item["input"], dict) else f" = {item['input']!r}"


def _user_path(location: Sequence[int | str], raw: Any) -> Iterator[int | str]:
    """The keys a user would look for: without the union tags that pydantic puts between them."""
    for place, part in enumerate(location):
        here = isinstance(raw, Mapping) and part in raw
        if here or (isinstance(raw, list) and isinstance(part, int)):
            raw = raw[part] if here or int(part) < len(raw) else None
            yield part
        elif isinstance(raw, Mapping) and place == len(location) - 1:
            yield part


def _rule(item: Any, known: Callable[[], set[str]]) -> str:
    if item["type"] == "extra_forbidden":
        name = str(item["loc"][-1])
        return f"unknown setting{suggest(name, known() - {name})}"
    if item["type"] == "missing":
        return "is missing, and has no default"
    if item["type"] == "union_tag_invalid":
        kind, kinds = repr(item["ctx"]["tag"]), item["ctx"]["expected_tags"]
        return f"expected one of {kinds}{suggest(kind, kinds.split(', '))}"
    if item["type"] == "list_type":
        return "expected a list in brackets, such as [1, 2, 3]"
    if item["type"] in ("too_short", "too_long") and isinstance(item["input"], list):
        bound = item["ctx"].get("min_length", item["ctx"].get("max_length"))
        side = "at least" if item["type"] == "too_short" else "at most"
        return f"expected {side} {bound} item{'s' * (bound != 1)}"
    message: str = item["msg"]
    return message.removeprefix("Value error, ").replace("Input should be", "expected")
