"""The command line: `metaprior COMMAND`, see COMMANDS."""

import inspect
import os
import re
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

# For each command, its function and its text in `--help`, which can then be shown without importing the command.
COMMANDS = {
    "train": ("train.train", "Meta-train a recipe (a built-in name or a TOML file) into a run folder."),
    "evaluate": ("evaluate.evaluate", "Evaluate a run on new tasks and write a report (JSON) and plots to its folder."),
    "compare": ("compare.compare", "Compare the reports of several runs in a table and a plot of their figures after "
                "each inner step."),
    "adapt": ("adapt.adapt", "Adapt a run to labelled examples and predict others, with class probabilities or "
              "intervals."),
    "plot": ("plot.plot", "Plot a run's training curve, its predictions on new tasks (regression on one input) and "
             "learned gates."),
    "list": ("listing.listing", "List learners, recipes, suites, task sources, networks and posteriors."),
    "demo": ("demo.demo", "Meta-train MAML on sinusoids, adapt it to new ones from 5 and 10 points, and plot its "
             "uncertainty."),
    "truth": ("truth.truth", "Compare learners' posteriors with exact ones (linear-Gaussian hierarchy) or with NUTS."),
    "study": ("study.study", "Compare trained learners on one question."),
    "reproduce": ("reproduce.reproduce", "Train and evaluate the runs of a suite (a built-in name or a TOML file), and "
                  "write their results."),
    "results": ("reproduce.results", "Write a Markdown page of each suite's results, with a status relative to the "
                "published figures."),
}  # fmt: skip


def commands(args: list[str]) -> dict[str, Callable[..., int]]:
    """Returns the commands by name.

    If the arguments begin with a command, or only ask for help, no other command is imported.

    Args:
        args: The arguments of the command line.
    """
    first = args[0] if args else "--help"
    one = first in (*COMMANDS, "-h", "--help")
    return {name: _summary(text) if one and name != first else _imported(place)
            for name, (place, text) in COMMANDS.items()}  # fmt: skip


def _imported(place: str) -> Callable[..., int]:
    file, _, name = place.partition(".")
    module = import_module(f"metaprior.cli.{file}")
    for value in vars(module).values():
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            # The parser keeps line breaks within an argument's text, which would make the help ragged.
            value.__doc__ = re.sub(r"\n {8}(?=\S)", " ", inspect.getdoc(value) or "")
    return getattr(module, name)


def _summary(text: str) -> Callable[[], int]:
    def command() -> int:
        raise AssertionError("a command must be imported before it is called")

    command.__doc__ = text
    return command


def one_set(args: list[str]) -> list[str]:
    """Merges all --set options into one, at the end, since the parser would silently keep only the last one.

    Args:
        args: The arguments of the command line.
    """
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
    """Runs a command and exits.

    Errors are printed in one sentence. The exit status is 0 if the command succeeds, 2 for bad input and 1 for other
    errors; Ctrl-C gives 130, SIGTERM 143 and SIGHUP 129.

    Args:
        args: The arguments. The default is those of the process.
    """
    given, show = one_set(sys.argv[1:] if args is None else args), warnings.showwarning
    try:
        warnings.showwarning = lambda message, *rest, **more: _say("warning", "yellow", message)
        with breaking_in(), warnings.catch_warnings():
            # A warning is a sentence for the user, whatever filters the process has.
            warnings.filterwarnings("default", category=UserWarning)
            warnings.filterwarnings("default", category=RuntimeWarning)
            sys.exit(tyro.extras.subcommand_cli_from_dict(commands(given), prog="metaprior", args=given) or 0)
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Ended) else signal.SIGINT
        screen(stderr=True).print("stopped" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}")
        sys.exit(128 + signum)
    except BrokenPipeError:
        # The reader of the output, such as `| head`, has stopped reading.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        _say("error", "bold red", explained(error))
        sys.exit(1)
    except SystemExit:
        raise  # `--help` ends here, before the import below
    except (ValueError, MissingExtra, metaprior.NonFiniteLoss) as error:
        from metaprior.training.checkpoint import NotSaved

        _say("error", "bold red", error)
        sys.exit(2 if isinstance(error, ValueError) and not isinstance(error, NotSaved) else 1)
    finally:
        warnings.showwarning = show


def _say(kind: str, style: str, text: object) -> None:
    screen(stderr=True).print(Text.assemble((kind, style), f": {text}"), soft_wrap=True)
