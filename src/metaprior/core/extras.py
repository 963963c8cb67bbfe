"""Libraries that only a part of the package needs: an extra installs them, and an error names it where one is missing.

    with extra("plots", "A picture"):
        from matplotlib.figure import Figure

The base dependencies are imported as usual. `tests/test_imports.py` checks that nothing else is.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A library of an extra is not installed, or is too old."""


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Around imports of libraries that an extra installs.

    Args:
        name: the extra in pyproject.toml, such as "plots".
        purpose: what needs the libraries, as the message begins with it.

    Raises:
        MissingExtra: an import failed: "A picture needs the extra `plots` (No module named 'matplotlib'): ...".
    """
    try:
        yield
    except MissingExtra:
        raise
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "metaprior":
            raise
        message = f"{purpose} needs the extra `{name}` ({error}): pip install 'metaprior[{name}]'"
        raise MissingExtra(message, name=error.name) from error
