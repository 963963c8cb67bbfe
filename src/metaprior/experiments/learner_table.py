"""The table of learners in README.md and docs/learners.md, generated from the registry.

Both pages have the marks `<!-- learners -->` and `<!-- /learners -->`. `make results` writes the table between them.
"""

from pathlib import Path

from metaprior.core.files import write_atomically
from metaprior.core.named import summary
from metaprior.experiments.pages import between, markdown
from metaprior.learners import LEARNERS

OPEN, CLOSE = "<!-- learners -->", "<!-- /learners -->"
PAGES = {  # where the name of a learner links to
    "README.md": "src/metaprior/learners/{file}.py",
    "docs/learners.md": "api/learners.md#{module}.{name}",
}


def learner_table(link: str) -> str:
    """Returns a Markdown table with each of the library's learners and the first line of its docstring.

    Args:
        link: The target of a learner's link, with the fields `module`, `file` (the module's last part) and `name`.
    """
    rows = []
    for name, factory in LEARNERS.items():
        if factory.__module__.startswith("metaprior.learners."):  # not those that other packages have registered
            module = factory.__module__
            target = link.format(module=module, file=module.rpartition(".")[2], name=factory.__name__)
            rows.append([f"[`{name}`]({target})", summary(factory)])
    return markdown(["name", "what it does"], rows)


def with_learners(page: str, text: str) -> str:
    """Replaces the table of learners in a page. A page without the marks is not changed.

    Args:
        page: The page's path from the root of the checkout, one of `PAGES`.
        text: The page's text.
    """
    return between(text, learner_table(PAGES[page]), OPEN, CLOSE)


def write_learner_tables(root: Path) -> list[Path]:
    """Writes the tables of learners in a checkout anew.

    Args:
        root: The root of the checkout.

    Returns:
        The paths of the pages.

    Raises:
        ValueError: A page is missing.
    """
    for page in PAGES:
        if not (root / page).is_file():
            raise ValueError(f"learners must be the root of a checkout, got {root}, which has no {page}.")
    for page in PAGES:
        write_atomically(root / page, with_learners(page, (root / page).read_text(encoding="utf-8")))
    return [root / page for page in PAGES]
