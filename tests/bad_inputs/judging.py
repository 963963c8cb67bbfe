"""A case and its verdict: clear, works, or one of the faults silent, obscure, hang, crash."""

import contextlib
import io
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from metaprior.cli import main
from metaprior.training.loop import NonFiniteLoss

LIMIT = 120  # seconds until a case counts as one that hangs; compiling on a busy machine is slow


class Case(NamedTuple):
    """name: unique. run: given an empty folder, does it. says: words that the error must have (clear), or `right`:
    what the result must satisfy (works)."""

    name: str
    run: Callable[[Path], Any]
    says: tuple[str, ...] = ()
    right: Callable[[Any], bool] | None = None


class Ended(Exception):
    """The command line ended with a status other than 0, after these words."""


def cli(*args: Any) -> str:
    """What a command prints; `Ended` with what it says in error if its status is not 0."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(a) for a in args])
    except SystemExit as end:
        if end.code not in (0, None):
            raise Ended(f"{end.code}: {out.getvalue()} {err.getvalue()}") from None
    return out.getvalue()


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """A TimeoutError after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case, folder: Path) -> tuple[str, str]:
    """(verdict, what came): 'clear' or 'works' as the case expects, or the fault."""
    try:
        with limited(LIMIT), warnings.catch_warnings():
            warnings.simplefilter("default")  # a warning is no verdict
            result = case.run(folder)
    except TimeoutError as error:
        return "hang", str(error)
    except (ValueError, NonFiniteLoss, Ended) as error:
        text = " ".join(str(error).split())
        if case.right is not None:
            return "obscure", f"refused what is right: {text}"
        missing = [word for word in case.says if word.lower() not in text.lower()]
        unclear = missing or "Traceback" in text or (isinstance(error, Ended) and text[:2] not in ("1:", "2:"))
        return ("obscure", f"without {missing}: {text}") if unclear else ("clear", text)
    except BaseException as error:
        return "obscure", f"{type(error).__name__}: {error}"
    if case.right is None:
        return "silent", f"taken: {str(result)[:200]}"
    return ("works", "") if case.right(result) else ("silent", f"wrong: {str(result)[:200]}")
