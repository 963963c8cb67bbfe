"""Names that users choose are printed and drawn letter by letter: neither markup nor formulas."""

import io

import pytest
from rich.table import Table

from metaprior.cli import main
from metaprior.cli.progress import Progress
from metaprior.cli.screen import screen
from metaprior.evaluation.figures import Figure
from metaprior.evaluation.plots import compared_curves
from metaprior.evaluation.report import Report

NAMES = ["[/b]", "[bold]", "a[red]b", "$x^2", "100 % of $y$", r"\$", "[link=x]y"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_as_it_stands(name):
    file = io.StringIO()
    table = Table(title=f"title {name}")
    table.add_column(f"column {name}")
    table.add_row(f"cell {name}")
    console = screen(file=file, width=100)
    console.print(table)
    console.print(f"line {name}")
    for place in ("title", "column", "cell", "line"):
        assert f"{place} {name}" in file.getvalue()


def test_an_error_is_printed_as_it_stands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "no/[/b]run"])
    assert stopped.value.code == 2
    assert "no/[/b]run, which has no recipe.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_stands(name):
    report = Report("regression", 2, {"mse": Figure(1.0, 0.1)}, {})
    figure = compared_curves({name: report})
    shown = figure.axes[0].get_legend().get_texts()[0]
    figure.canvas.draw()
    # What matplotlib takes for a formula is none here, and it gives back what was written.
    assert shown._preprocess_math(shown.get_text()) == (name, False)


@pytest.mark.parametrize(("target", "told"), [("[b]x", "on standardised [b]x: mse 0.2500"), (None, "| mse 0.2500")])
def test_figures_of_a_standardised_target_say_so(target, told):
    file = io.StringIO()
    with Progress(1, screen(file=file), target) as progress:
        progress.report({"step": 1, "steps_per_second": 2.0, "train/mse": 0.25, "validation/nll": 1.0})
    assert told in file.getvalue()
    assert ("standardised" in file.getvalue()) == (target is not None)
