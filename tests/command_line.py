"""Runs the command line inside the tests' process; what is no error for users is raised."""

from __future__ import annotations

from click.testing import CliRunner, Result

from satdifuser.cli import cli


def call(*words: object) -> Result:
    """Run a command, whatever comes of it."""
    result = CliRunner().invoke(cli, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*words: object) -> str:
    """Run a command that must succeed; what it prints."""
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*words: object) -> str:
    """Run a command that must be refused; its message."""
    result = call(*words)
    assert result.exit_code != 0, result.output
    return result.stderr
