"""Signals such as Ctrl-C: the first one ends work in an orderly way, the second one immediately."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Ctrl-C, a scheduler's time limit, a terminal that closes


class Ended(KeyboardInterrupt):
    """A signal asked the process to end.

    Attributes:
        signum: The signal's number.
    """

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


@contextmanager
def interruptible() -> Iterator[Any]:
    """Context manager in which signals to end set a flag and do not interrupt the code.

    It yields a function that returns the signal's number, or 0 if there was none.
    """
    asked = 0

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = signum

    with _handled(ask, b"\nending after this chunk of meta-steps, saved; a second signal ends at once\n"):
        yield lambda: asked


@contextmanager
def breaking_in() -> Iterator[None]:
    """Context manager in which signals to end raise `Ended`, so that unfinished work is cleaned up."""

    def end(signum: int, frame: Any) -> None:
        raise Ended(signum)

    with _handled(end):
        yield


@contextmanager
def _handled(handler: Any, said: bytes = b"") -> Iterator[None]:
    """Installs the handler for every signal to end. The second such signal ends the process immediately.

    At the first signal, `said` is written to the standard error.

    Python runs handlers only between its own instructions, and one instruction, a compilation, may take minutes.
    Therefore a thread counts the signals, which the system writes to a pipe as they arrive. Python also drops
    exceptions that a handler raises inside a callback of the garbage collector (JAX has one) or inside a `__del__`. The
    signal is then raised again, outside of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A signal that is ignored, as nohup does with SIGHUP, stays ignored.
    before = {s: signal.signal(s, handler) for s in ENDS if signal.getsignal(s) is not signal.SIG_IGN}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    repeated, show = [], sys.unraisablehook

    def repeat(dropped: Any) -> None:
        if isinstance(dropped.exc_value, Ended):
            repeated.append(dropped.exc_value.signum)
            threading.Timer(0.01, _thread.interrupt_main, (dropped.exc_value.signum,)).start()
        else:
            show(dropped)

    def count() -> None:
        first = True
        while came := os.read(reader, 1):
            if came[0] not in before:
                continue
            if came[0] in repeated:
                repeated.remove(came[0])
                continue
            if not first:
                os._exit(128 + came[0])
            first = False
            os.write(2, said)
        os.close(reader)

    threading.Thread(target=count, daemon=True).start()
    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = show
        signal.set_wakeup_fd(woken)
        for signum, old in before.items():
            signal.signal(signum, old)
        os.close(writer)
