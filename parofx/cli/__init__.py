"""The `parofx` command. One file per command; what is slow to import is imported inside the commands."""

from parofx.cli.app import app, main

__all__ = ["app", "main"]
