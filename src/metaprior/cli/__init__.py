"""The command line: `metaprior train | evaluate | compare | adapt | plot | list | demo | truth | study`."""

import sys

import tyro
from rich.text import Text

from metaprior.cli.adapt import adapt
from metaprior.cli.compare import compare
from metaprior.cli.demo import demo
from metaprior.cli.evaluate import evaluate
from metaprior.cli.listing import listing
from metaprior.cli.plot import plot
from metaprior.cli.screen import screen
from metaprior.cli.study import study
from metaprior.cli.train import train
from metaprior.cli.truth import truth
from metaprior.training import NonFiniteLoss

COMMANDS = {
    "train": train, "evaluate": evaluate, "compare": compare, "adapt": adapt, "plot": plot, "list": listing,
    "demo": demo, "truth": truth, "study": study,
}  # fmt: skip


def one_set(args: list[str]) -> list[str]:
    """The arguments with every --set in one, at the end: of several the parser would keep the last alone, silently."""
    others, options, here = [], [], False
    for argument in args:
        name, _, value = argument.partition("=")
        here = name == "--set" or (here and not argument.startswith("-"))
        if not here:
            others.append(argument)
        elif name != "--set":
            options.append(argument)
        elif value:
            options.append(value)
    return others + (["--set", *options] if options else [])


def main(args: list[str] | None = None) -> None:
    """Run a command; what went wrong is said in a sentence, with exit status 2 (bad input) or 1."""
    try:
        given = one_set(sys.argv[1:] if args is None else args)
        sys.exit(tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="metaprior", args=given) or 0)
    except (ValueError, NonFiniteLoss) as error:
        screen(stderr=True).print(Text.assemble(("error", "bold red"), f": {error}"), soft_wrap=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)
