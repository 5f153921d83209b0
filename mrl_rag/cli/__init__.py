"""The `mrl-rag` command: each subcommand calls one function of the core, and prints what it returns."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after the command's name; None for those of the process.

    Returns:
        The exit status: 0 when all is fine, 1 when trouble was found, 2 when the command can't be carried out, 130 when
        it was interrupted.
    """
    try:
        # Not above: an interruption while it is imported would end in a traceback.
        from mrl_rag.cli.app import run

        return run(arguments)
    except KeyboardInterrupt:
        return 130
