"""The `mrl-rag` command: each subcommand calls one function of the core, and prints what it returns."""

from mrl_rag.cli.app import main

__all__ = ["main"]
