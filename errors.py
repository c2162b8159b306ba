"""The package's errors: one root, a few user-facing kinds.

A message says what is wrong, where (file, field, tile), the value seen, the value expected and how to
mend it. The command line prints the message alone, without a traceback, and leaves with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class BackboneError(SatDiFuserError, ValueError):
    """A backbone folder is incomplete, or does not fit the request."""


class FeatureError(SatDiFuserError, ArithmeticError):
    """A feature value cannot be stored: not finite, or beyond the encoding's range."""


class StoreError(SatDiFuserError, RuntimeError):
    """A feature store is missing, incomplete, damaged or made with other settings."""


class RunError(SatDiFuserError, RuntimeError):
    """A fitted run is missing, or does not fit the store it is used on."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Name the nearest known words: ``"; did you mean a, b?"``, or nothing.

    Args:
        name: What the user wrote.
        known: What would have been accepted.
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
