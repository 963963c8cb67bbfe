"""The command `metaprior`. It imports nothing at first, so that Ctrl-C ends it with one line even during imports."""

import os
import signal
from types import FrameType


def _stop(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(128 + signum)


def main() -> None:
    """Run the command line."""
    before = signal.signal(signal.SIGINT, _stop)
    from metaprior.cli import main as command

    signal.signal(signal.SIGINT, before)
    command()
