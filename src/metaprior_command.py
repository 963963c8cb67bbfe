"""The command `metaprior`. It imports little at first, so that Ctrl-C ends it with one line even during imports."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def _stop(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(128 + signum)


def main() -> None:
    """Runs the command line."""
    before = signal.signal(signal.SIGINT, _stop)
    from metaprior.core.extras import MissingExtra

    try:
        from metaprior.cli import commands
        from metaprior.cli import main as command

        commands(sys.argv[1:])  # imports the modules of the command
    except MissingExtra as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGINT, before)
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:
            # Unfinished work has been cleaned up, but XLA's threads may still run, and they crash while the interpreter
            # shuts down.
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(end.code)
        raise
