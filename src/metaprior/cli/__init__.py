"""The command line: `metaprior COMMAND`, see COMMANDS."""

import os
import signal
import sys
import warnings

import tyro
from rich.text import Text

from metaprior.checkpoint import NotSaved
from metaprior.cli.adapt import adapt
from metaprior.cli.compare import compare
from metaprior.cli.demo import demo
from metaprior.cli.evaluate import evaluate
from metaprior.cli.listing import listing
from metaprior.cli.plot import plot
from metaprior.cli.reproduce import reproduce, results
from metaprior.cli.screen import screen
from metaprior.cli.study import study
from metaprior.cli.train import train
from metaprior.cli.truth import truth
from metaprior.files import explained
from metaprior.signals import Ended, breaking_in
from metaprior.training import NonFiniteLoss

COMMANDS = {
    "train": train, "evaluate": evaluate, "compare": compare, "adapt": adapt, "plot": plot, "list": listing,
    "demo": demo, "truth": truth, "study": study, "reproduce": reproduce, "results": results,
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
    """Run a command; what went wrong is said in a sentence, with exit status 2 (bad input) or 1.

    Ctrl-C ends it with one line and status 130, SIGTERM with 143, SIGHUP with 129.
    """
    given, show = one_set(sys.argv[1:] if args is None else args), warnings.showwarning
    try:
        warnings.showwarning = lambda message, *rest, **more: _say("warning", "yellow", message)
        with breaking_in():
            sys.exit(tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="metaprior", args=given) or 0)
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
    except (ValueError, NonFiniteLoss) as error:
        _say("error", "bold red", error)
        sys.exit(1 if isinstance(error, (NonFiniteLoss, NotSaved)) else 2)
    finally:
        warnings.showwarning = show


def _say(kind: str, style: str, text: object) -> None:
    screen(stderr=True).print(Text.assemble((kind, style), f": {text}"), soft_wrap=True)
