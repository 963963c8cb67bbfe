"""Tables of reports for the terminal."""

from rich.table import Table

from metaprior.evaluation.figures import digits_of, title_of
from metaprior.evaluation.report import Memorisation, Report


def report_table(report: Report, title: str = "") -> Table:
    """Returns a table of a report's figures with their 95 % intervals, and its notes below.

    Args:
        report: The report.
        title: The title. The default is the number of tasks.
    """
    table = Table(title=report.heading(title), title_justify="left", header_style="bold")
    table.caption, table.caption_justify = "\n".join(f"note: {note}" for note in report.notes) or None, "left"
    table.add_column("figure")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, figure in report.figures.items():
        digits = digits_of(figure.mean)
        interval = "" if figure.interval is None else f"± {figure.interval:{digits}}"
        table.add_row(title_of(name), f"{figure.mean:{digits}}", interval)
    for name, value in report.pooled.items():
        table.add_row(title_of(name), "-" if value is None else f"{value:{digits_of(value)}}", "")
    return table


def family_table(report: Report) -> Table | None:
    """Returns a table with one row of figures per family of tasks, or None if there is a single family.

    Widths, the other coverages and the Brier score are in the report's file only.

    Args:
        report: The report.
    """
    if not report.families:
        return None
    table = Table(title="families", title_justify="left", header_style="bold")
    table.add_column("family", no_wrap=True)
    names = [name for name in report.figures if not name.startswith(("width_", "brier", "coverage_50", "coverage_95"))]
    rows = report.families | {"all": report.figures}
    names = [name for name in names if all(name in row for row in rows.values())]
    for name in names:
        table.add_column(title_of(name), justify="right", no_wrap=True)
    for family, row in rows.items():
        table.add_row(family, *(str(row[name]) for name in names))
    return table


def curve_table(report: Report) -> Table | None:
    """Returns a table of the figures after each inner step, or None if there are no inner steps.

    After 10 steps, only every tenth and the last one are shown.

    Args:
        report: The report.
    """
    if not report.curve:
        return None
    table = Table(title="after each inner step", title_justify="left", header_style="bold")
    table.add_column("steps", justify="right")
    for name in report.curve[0]:
        table.add_column(title_of(name), justify="right")
    for step, row in enumerate(report.curve):
        if step <= 10 or step % 10 == 0 or step == len(report.curve) - 1:
            table.add_row(str(step), *(str(figure) for figure in row.values()))
    return table


def memorisation_table(found: Memorisation) -> Table:
    """Returns a table of the queries' scores, with one row per support.

    Args:
        found: The diagnosis.
    """
    titles, rows = found.rows()
    table = Table(title=found.heading(), title_justify="left", header_style="bold")
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table
