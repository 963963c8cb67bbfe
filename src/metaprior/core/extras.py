"""Optional libraries: an extra installs them, and the error for a missing one names the extra.

    with extra("plots", "A plot"):
        from matplotlib.figure import Figure

The base dependencies are imported as usual. `tests/test_imports.py` checks that no other library is.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A library of an extra is not installed, or is too old."""


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Context manager for imports of libraries that an extra installs.

    Args:
        name: The extra in pyproject.toml, e.g. "plots".
        purpose: What needs the libraries: the first words of the message.

    Raises:
        MissingExtra: An import failed: "A plot needs the extra `plots` (No module named 'matplotlib'): ...".
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
