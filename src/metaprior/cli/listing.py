"""metaprior list: list the learners, recipes and other components."""

from rich.table import Table
from rich.text import Text

from metaprior.cli.screen import screen
from metaprior.core.named import summary
from metaprior.experiments.recipe import load_recipe, recipe_names
from metaprior.experiments.suite import load_suite, suite_names
from metaprior.inference.posteriors import POSTERIORS
from metaprior.learners import LEARNERS
from metaprior.networks import NETWORKS
from metaprior.tasks import SOURCES


def listing() -> int:
    """List learners, recipes, suites, task sources, networks and posteriors."""
    console = screen()
    sections = {
        "learners": {name: summary(factory) for name, factory in LEARNERS.discovered().items()},
        "recipes": {name: load_recipe(name).description for name in recipe_names()},
        "suites": {name: load_suite(name).title for name in suite_names()},
        "task sources": {name: summary(factory) for name, factory in SOURCES.discovered().items()},
        "networks": {name: summary(factory) for name, factory in NETWORKS.discovered().items()},
        "posteriors": {name: summary(factory) for name, factory in POSTERIORS.items()},
    }
    for title, entries in sections.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        for name, text in entries.items():
            table.add_row(Text(name, "cyan"), text)
        console.print(table)
        console.print()
    return 0
