"""Pages of results: a readable Markdown table of each suite, made from its JSON files and nothing else.

results/SUITE/about.md   results/SUITE/RUN.json   ->   docs/results/SUITE.md
benchmarks/results/NAME.json                      ->   docs/results/speed.md
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from metaprior.core.files import write_atomically
from metaprior.core.options import accept
from metaprior.evaluation.figures import Figure, title_of
from metaprior.experiments.results import LOWER, Result, figures_of, read_suite, statuses
from metaprior.experiments.results import SHARES as PERCENT

LEFT_OUT = ("width_", "coverage_50", "coverage_95", "brier")  # of tables; they are in the JSON files
MADE = "<!-- Made by `make results` from the JSON files in {}; edit those. -->"
OPEN, CLOSE = "<!-- headlines, made by `make results` -->", "<!-- end of headlines -->"
STATUS = """\
**Status** is computed from the row and the published figure. *Reached*: as good or better. *Within the interval*:
either of the two lies in the other's 95 % interval. *Below*: worse than that. *Not comparable*: with the reason.
*Cut short*: training ended before the meta-steps that it was to have."""
DAGGER = '† A figure without its run: its run folder was not kept (`"run": null`).'


def digits_of(name: str, result: Result | None) -> int:
    """Decimals of a figure as it is shown."""
    usual = 2 if name.startswith(PERCENT) else 4 if name in ("ece", "mce") else 3
    return usual if result is None else result.digits.get(name, usual)


def shown(name: str, figure: Figure | None, result: Result | None = None) -> str:
    """A figure as a cell of the table; accuracy and its kin in %. result: the one whose figure it is."""
    if figure is None:
        return ""
    scale, digits = 100 if name.startswith(PERCENT) else 1, digits_of(name, result)
    parts = [value for value in (figure.mean, figure.interval) if value is not None]
    return " ± ".join(number(scale * value, digits) for value in parts)


def number(value: float, digits: int) -> str:
    """A number with so many decimals and separated thousands; one that is not finite by its name."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "diverged"


def heading(name: str) -> str:
    return title_of(name) + (" %" if name.startswith(PERCENT) else "")


def result_tables(results: dict[str, Result]) -> str:
    """The tables of a suite, one for each `table` that its results name, in the order of their first file."""
    groups: dict[str, dict[str, Result]] = {}
    for name, result in results.items():
        groups.setdefault(result.table, {})[name] = result
    titles = sorted(groups, key=bool)  # what has no title is first
    return "\n\n".join((f"## {title}\n\n" if title else "") + result_table(groups[title]) for title in titles)


def result_table(results: dict[str, Result]) -> str:
    """One table: what was judged, its figures, and, where any has a published figure or was cut short, the status."""
    names = dict.fromkeys(n for r in results.values() for n in figures_of(r) if not n.startswith(LEFT_OUT))
    found = {name: statuses(result) for name, result in results.items()}
    compared = any("" not in one for one in found.values())
    columns: dict[str, Any] = {"learner": lambda name, r: label(name, r)}
    if len({result.recipe for result in results.values()} - {None}) > 1:
        columns["recipe"] = lambda name, r: f"`{r.recipe}`" if r.recipe else ""
    columns["as judged"] = lambda name, r: asked_of(r)
    columns["meta-steps"] = lambda name, r: length(r)
    columns["minutes"] = lambda name, r: "" if r.minutes is None else f"{r.minutes:.4g}"
    columns["on"] = lambda name, r: r.device or ""
    columns["tasks"] = lambda name, r: f"{r.report.tasks:,}"
    for figure in names:
        columns[heading(figure)] = lambda name, r, figure=figure: shown(figure, figures_of(r).get(figure), r)
    if compared or any(result.cut for result in results.values()):
        columns["published"] = lambda name, r: ", ".join(
            (f"{title_of(of)} " if len(found[name]) > 1 else "") + shown(of, theirs)
            for of, (theirs, _) in found[name].items() if of
        )  # fmt: skip
        columns["status"] = lambda name, r: told(found[name])
    columns["note"] = lambda name, r: r.note
    rows = [[make(name, result) for make in columns.values()] for name, result in results.items()]
    text = markdown(list(columns), rows)
    return text if compared else f"{text}\n\nThere are no published figures to compare these with."


def told(found: dict[str, tuple[Figure, Any]]) -> str:
    """The statuses of a row, once where all are the same."""
    kinds = {name: status.kind for name, (_, status) in found.items()}
    first = next(status for _, status in found.values())
    if len(set(kinds.values())) > 1:  # how much training there was and whether it was cut short is the row's
        first = first._replace(kind="; ".join(f"{title_of(name)} {kind}" for name, kind in kinds.items()))
    return str(first)


def label(name: str, result: Result) -> str:
    """A row's name, with a dagger where its run was not kept."""
    title = result.title or f"`{result.learner}`"
    return title + ("" if result.run else " †")


def asked_of(result: Result) -> str:
    """What a run was judged on where that is not its recipe's own: options, split, posterior."""
    parts = [f"{name.removeprefix('tasks.')} = {json.dumps(value)}" for name, value in result.judged.items()]
    parts += [result.split] if result.split != "test" else []
    parts += [result.posterior] if result.posterior else []
    return ", ".join(parts + (["calibrated"] if result.calibrated else []))


def length(result: Result) -> str:
    """'1,800 of 3,400', with the tasks a meta-step where they are not the recipe's own."""
    if result.steps is None:
        return ""
    batch = result.overrides.get("training.meta_batch")
    said = f"{result.steps:,}" + (f" of {result.asked:,}" if result.cut else "")
    return (
        said
        + (f" x {batch}" if batch else "")
        + (f", {schedule}" if (schedule := result.overrides.get("training.schedule")) else "")
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without its empty columns."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [[columns[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def suite_page(folder: Path) -> str:
    """The page of a suite's folder: what about.md says, and its tables.

    Raises:
        ValueError: the folder holds no results, or a damaged one.
    """
    results = read_suite(folder)
    if not results:
        raise ValueError(f"{folder}: holds no results (no JSON file in it); `metaprior reproduce` writes some")
    about = folder / "about.md"
    text = about.read_text(encoding="utf-8").strip() if about.is_file() else f"# {folder.name}"
    tables = result_tables(results)
    legend = [STATUS] * ("| status |" in tables) + [DAGGER] * ("†" in tables)
    return "\n\n".join([MADE.format(f"results/{folder.name}"), text, tables, *legend]) + "\n"


def headlines(results: Path, pages: str) -> str:
    """Of each suite, learner and published figure the best row; pages: the path to the suites' pages."""
    rows = []
    for folder in suites_in(results):
        best: dict[tuple[str, str, float], tuple[float, list[str]]] = {}
        for result in read_suite(folder).values():
            found = statuses(result)
            name, (theirs, status) = next(iter(found.items()))
            if status.kind == "not comparable":
                continue
            ours = figures_of(result)[name]
            value, key = ours.mean * (-1 if name in LOWER else 1), (result.learner, name, theirs.mean)
            value = -math.inf if math.isnan(value) else value
            if key not in best or value > best[key][0]:
                link = f"[{title_in(folder)}]({pages}{folder.name}.md)"
                figures = heading(name), shown(name, ours, result), shown(name, theirs)
                best[key] = value, [link, label("", result), *figures, told(found)]
        rows += [row for _, (_, row) in sorted(best.items(), key=lambda item: item[0][0])]
    if not rows:
        return "None of the results has a published figure to compare it with."
    return markdown(["suite", "learner", "figure", "ours", "published", "status"], rows)


def suites_in(results: Path) -> list[Path]:
    return [folder for folder in sorted(results.iterdir()) if folder.is_dir()]


def title_in(folder: Path) -> str:
    """The title of a suite: the first line of its about.md, or its name."""
    about = folder / "about.md"
    return about.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") if about.is_file() else folder.name


def index_page(results: Path, speed: bool) -> str:
    """The page of pages: the headline rows, and a link to every page."""
    links = [f"* [{title_in(folder)}]({folder.name}.md)" for folder in suites_in(results)]
    links += ["* [Speed, memory and compile time](speed.md)"] if speed else []
    lead = "The best row of each suite, learner and published figure."
    parts = [MADE.format("results"), "# Results", lead, headlines(results, ""), STATUS, DAGGER, "## Pages"]
    return "\n\n".join([*parts, "\n".join(links)]) + "\n"


def with_headlines(text: str, table: str) -> str:
    """A page with the table between its two marks."""
    before, mark, rest = text.partition(OPEN)
    _, close, after = rest.partition(CLOSE)
    return f"{before}{mark}\n{table}\n{close}{after}" if mark and close else text


def benchmark_page(folder: Path) -> str:
    """The page of the benchmarks' figures: each file has a title, what to know first (`about`) and rows of figures."""
    parts = [MADE.format("benchmarks/results"), "# Speed, memory and compile time"]
    for path in sorted(folder.glob("*.json")):
        try:
            table = accept(dict, json.loads(path.read_text(encoding="utf-8")), "a benchmark")
            rows = accept(list, table["rows"], "rows")
            columns = list(dict.fromkeys(name for row in rows for name in accept(dict, row, "rows")))
            parts += [f"## {table['title']}", table["about"]]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not the figures of a benchmark ({error})") from error
        parts.append(markdown(columns, [[cell(row.get(name, "")) for name in columns] for row in rows]))
        parts += [table["reading"]] if table.get("reading") else []
    return "\n\n".join(parts) + "\n"


def cell(value: Any) -> str:
    """A benchmark's value: numbers as they are, several as 'a / b'."""
    if isinstance(value, list):
        return " / ".join(cell(one) for one in value)
    return value if isinstance(value, str) else f"{value:,}"


def write_pages(results: Path, benchmarks: Path, out: Path) -> list[Path]:
    """Write the page of each suite, that of the benchmarks and an index; the pages in `out` that this made."""
    if not results.is_dir():
        raise ValueError(f"results: no folder {results}; `metaprior reproduce` makes one")
    pages = {folder.name: suite_page(folder) for folder in suites_in(results)}
    pages |= {"speed": benchmark_page(benchmarks)} if benchmarks.is_dir() else {}
    pages["index"] = index_page(results, benchmarks.is_dir())
    out.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        write_atomically(out / f"{name}.md", text)
    return [out / f"{name}.md" for name in pages]
