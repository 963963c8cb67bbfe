"""The command line: `metaprior COMMAND`, see COMMANDS."""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib import import_module

import metaprior
from metaprior.core.extras import MissingExtra, extra
from metaprior.core.files import explained
from metaprior.core.signals import Ended, breaking_in

with extra("cli", "The command line"):
    import tyro
    from rich.text import Text

    from metaprior.cli.screen import screen

# By name, where each is and what `--help` says of it, so that it need not be imported for that.
COMMANDS = {
    "train": ("train.train", "Meta-train a recipe (a built-in name or a TOML file) into a run folder."),
    "evaluate": ("evaluate.evaluate", "Judge a run on new tasks: a table, a JSON file and pictures in its folder."),
    "compare": ("compare.compare", "Hold the reports of several runs beside each other: a table, and a picture of "
                "their courses by inner steps."),
    "adapt": ("adapt.adapt", "Adapt a run to labelled examples and predict others: a table with class probabilities "
              "or means and intervals."),
    "plot": ("plot.plot", "Draw a run's training curve, for regression on a line what its posterior says of new "
             "tasks, and learned gates."),
    "list": ("listing.listing", "List learners, recipes, suites, task sources, networks and posteriors."),
    "demo": ("demo.demo", "Meta-train MAML on sinusoids, adapt to new ones from 5 and 10 points, and show what it is "
             "sure of."),
    "truth": ("truth.truth", "Hold learners' posteriors against exact ones: of the conjugate hierarchy, or of NUTS."),
    "study": ("study.study", "Hold trained learners beside each other on one question."),
    "reproduce": ("reproduce.reproduce", "Train and judge the runs of a suite (a built-in name or a TOML file), and "
                  "write RESULTS/SUITE/RUN.json of each."),
    "results": ("reproduce.results", "Make a Markdown page of each suite's results, with the status of each row beside "
                "the published figure."),
}  # fmt: skip


def commands(args: list[str]) -> dict[str, Callable[..., int]]:
    """The commands by name. Where the arguments begin with one, or ask for help alone, only that one is imported."""
    first = args[0] if args else "--help"
    one = first in (*COMMANDS, "-h", "--help")
    return {name: _summary(text) if one and name != first else _imported(place)
            for name, (place, text) in COMMANDS.items()}  # fmt: skip


def _imported(place: str) -> Callable[..., int]:
    module, _, name = place.partition(".")
    return getattr(import_module(f"metaprior.cli.{module}"), name)


def _summary(text: str) -> Callable[[], int]:
    def command() -> int:
        raise AssertionError("a command that was asked for is imported")

    command.__doc__ = text
    return command


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
    """Run a command; what went wrong is said in a sentence, with exit status 2 (bad input) or 1.

    Ctrl-C ends it with one line and status 130, SIGTERM with 143, SIGHUP with 129.
    """
    given, show = one_set(sys.argv[1:] if args is None else args), warnings.showwarning
    try:
        warnings.showwarning = lambda message, *rest, **more: _say("warning", "yellow", message)
        with breaking_in():
            sys.exit(tyro.extras.subcommand_cli_from_dict(commands(given), prog="metaprior", args=given) or 0)
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Ended) else signal.SIGINT
        screen(stderr=True).print("stopped" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}")
        sys.exit(128 + signum)
    except BrokenPipeError:
        # What reads the output, as `| head` does, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        _say("error", "bold red", explained(error))
        sys.exit(1)
    except SystemExit:
        raise  # before what follows is imported, as `--help` ends so
    except (ValueError, MissingExtra, metaprior.NonFiniteLoss) as error:
        from metaprior.training.checkpoint import NotSaved

        _say("error", "bold red", error)
        sys.exit(2 if isinstance(error, ValueError) and not isinstance(error, NotSaved) else 1)
    finally:
        warnings.showwarning = show


def _say(kind: str, style: str, text: object) -> None:
    screen(stderr=True).print(Text.assemble((kind, style), f": {text}"), soft_wrap=True)
