"""Reports as tables to print."""

from rich.table import Table

from metaprior.evaluation.figures import digits_of, title_of
from metaprior.evaluation.report import Report


def report_table(report: Report, title: str = "") -> Table:
    """Each figure of a report with its 95 % interval; the report's notes stand below."""
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


def curve_table(report: Report) -> Table | None:
    """Figures after each inner step, or None where there are no inner steps."""
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
