"""The command `metaprior`. It imports nothing at first, so that Ctrl-C ends it with one line even during imports."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def _stop(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(128 + signum)


def main() -> None:
    """Run the command line."""
    before = signal.signal(signal.SIGINT, _stop)
    from metaprior.core.extras import MissingExtra

    try:
        from metaprior.cli import commands
        from metaprior.cli import main as command

        commands(sys.argv[1:])  # imports what they need
    except MissingExtra as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGINT, before)
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:
            # Whatever was half done is cleaned up by now, but XLA's threads may still work, and they crash in an
            # interpreter that is being taken down.
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(end.code)
        raise
