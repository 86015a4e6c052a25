"""The command line: `saccade --help`. One file a family of commands; each registers with the application."""

from __future__ import annotations

import sys

from saccade.cli import browse, classify, explain, pretrain, train, use, weights  # noqa: F401, I001  in this order
from saccade.cli.shared import app
from saccade.core.errors import SaccadeError

__all__ = ["app", "main"]


def main() -> None:
    """The entry point: an error of the user's is one line and exit code 2, `--debug` shows where it came from."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except SaccadeError as error:
        if debug:
            raise
        print(f"saccade: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
