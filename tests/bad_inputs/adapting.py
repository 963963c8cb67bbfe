"""A trained run on a table meets files from elsewhere: other columns, encodings, separators, numbers, levels, classes.

The runs are trained once a process. What is right is held against the answer to the plain files.
"""

import csv
import io
import os
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from bad_inputs.judging import Case, cli

SUPPORT = [["hours", "kind", "late", "score"], ["1.5", "red", "true", "55"], ["2", "green", "false", "58.5"],
           ["8", "blue", "true", "75"]]  # fmt: skip
QUERY = [["hours", "kind", "late"], ["1", "red", "false"], ["9", "blue", "true"]]
RECIPE = """learner = "maml"
[tasks]
name = "table"
path = "{path}"
target = "{target}"
group = "school"
features = ["hours", "kind", "late"]
shot = 3
query = 3
[network]
name = "mlp"
hidden = [4]
[likelihood]
name = "{likelihood}"
[learners.maml]
steps = 2
rate = 0.05
[training]
steps = 10
meta_batch = 2
chunk = 5
validate_every = 5
validation_tasks = 2
rate = 1e-2
"""
GRADES = ("low", "high", "top")


@cache
def trained(target: str = "score") -> Path:
    """A run of ten meta-steps that predicts a score, or a grade of three; checkpoints at 5 and 10."""
    folder = Path(tempfile.mkdtemp(prefix="metaprior-bad-inputs-"))
    rng = np.random.default_rng(0)
    rows = ["school,hours,kind,late,score,grade"]
    for group in range(12):
        level = 50 + 5 * rng.normal()
        for i in range(8):
            hours = 10 * rng.random()
            score = level + 3 * hours + rng.normal()
            kind, late = ("red", "green", "blue")[i % 3], ("true", "false")[i % 2]
            rows.append(f"s{group:02d},{hours:.3f},{kind},{late},{score:.3f},{GRADES[i % 3]}")
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    likelihood = "gaussian" if target == "score" else "categorical"
    (folder / "r.toml").write_text(RECIPE.format(path=folder / "t.csv", target=target, likelihood=likelihood))
    cli("train", folder / "r.toml", "--out", folder / "run")
    return folder / "run"


def text(rows: list[list[str]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()


def answer(run: Path, support: bytes, query: bytes, folder: Path, suffixes: tuple[str, str] = (".csv", ".csv")) -> Any:
    """The predictions, a list of rows."""
    paths = [folder / f"{name}{suffix}" for name, suffix in zip(("s", "q"), suffixes, strict=True)]
    for path, raw in zip(paths, (support, query), strict=True):
        path.write_bytes(raw)
    cli("adapt", run, "--support", paths[0], "--query", paths[1], "--out", folder / "p.csv")
    with (folder / "p.csv").open() as file:
        return [
            {k: v if k in ("query", "prediction") else float(v) for k, v in row.items()} for row in csv.DictReader(file)
        ]


@cache
def plain(target: str = "score") -> Any:
    """The right answer: that to the plain files."""
    with tempfile.TemporaryDirectory() as folder:
        return answer(trained(target), text(support_of(target)), text(QUERY), Path(folder))


def support_of(target: str) -> list[list[str]]:
    grades = dict(zip(("55", "58.5", "75"), GRADES, strict=True))
    return (
        SUPPORT if target == "score" else [[grades.get(c, c.replace("score", "grade")) for c in row] for row in SUPPORT]
    )


def as_plain(found: Any) -> bool:
    return same(found, plain())


def same(found: Any, right: Any) -> bool:
    return len(found) == len(right) and all(
        a.keys() == b.keys() and all(a[k] == b[k] or abs(a[k] - b[k]) <= 1e-5 * abs(b[k]) for k in a)
        for a, b in zip(found, right, strict=True)
    )


def cell(rows: list[list[str]], name: str, value: str, row: int = 1) -> list[list[str]]:
    """The rows with another value in one cell."""
    found = [list(one) for one in rows]
    found[row][rows[0].index(name)] = value
    return found


def named(rows: list[list[str]], **names: str) -> list[list[str]]:
    return [[names.get(name, name) for name in rows[0]], *rows[1:]]


def without(rows: list[list[str]], name: str) -> list[list[str]]:
    return [[c for c, head in zip(row, rows[0], strict=True) if head != name] for row in rows]


def beside(rows: list[list[str]], name: str, *values: str) -> list[list[str]]:
    return [[*row, value] for row, value in zip(rows, (name, *(values * len(rows))[: len(rows) - 1]), strict=True)]


Change = Callable[[list[list[str]]], bytes]


def rowwise(change: Callable[[list[list[str]]], list[list[str]]]) -> Change:
    return lambda rows: text(change(rows))


def value(name: str, what: str) -> Change:
    return rowwise(lambda rows: cell(rows, name, what))


# name: (what is done to either file, the error's words); FILE stands for the name of the file
BAD: dict[str, tuple[Change, tuple[str, ...]]] = {
    "of another data set": (lambda rows: b"a,b,c\n1,2,3\n4,5,6\n", ("'hours'", "a, b, c")),
    "without a column": (rowwise(lambda rows: without(rows, "hours")), ("'hours'", "kind, late")),
    "without a category": (rowwise(lambda rows: without(rows, "kind")), ("'kind'",)),
    "with a column twice": (rowwise(lambda rows: beside(rows, "hours", "1")), ("FILE", "'hours'", "2 times")),
    "with a column named otherwise": (rowwise(lambda rows: named(rows, hours="hour")), ("'hours'", "hour")),
    "with a column in capitals": (rowwise(lambda rows: named(rows, hours="HOURS")), ("'hours'", "HOURS")),
    "without a header": (rowwise(lambda rows: rows[1:]), ("'hours'",)),
    "of semicolons": (lambda rows: text(rows).replace(b",", b";"), ("FILE", "';'", "commas")),
    "of tabs": (lambda rows: text(rows).replace(b",", b"\t"), ("FILE", "commas")),
    "of bars": (lambda rows: text(rows).replace(b",", b"|"), ("FILE", "'|'")),
    "in latin-1": (lambda rows: text(cell(rows, "kind", "rötlich")).decode().encode("latin-1"), ("FILE", "utf-8")),
    "in utf-16": (lambda rows: text(rows).decode().encode("utf-16"), ("FILE", "utf-8")),
    "with an open quote": (lambda rows: text(rows).replace(b"red", b'"red', 1), ("FILE", "not CSV")),
    "with a stray quote": (lambda rows: text(rows).replace(b"red", b'"re"d', 1), ("FILE", "not CSV")),
    "empty": (lambda rows: b"", ("FILE", "header")),
    "of blank lines": (lambda rows: b"\n\n \n", ("FILE",)),
    "of a header alone": (lambda rows: text(rows[:1]), ("FILE", "header and at least one row")),
    "with a short row": (lambda rows: text(rows) + b"1,red\n", ("FILE", "line", "got 2")),
    "with a long row": (lambda rows: text(rows) + b"1,red,true,3,4,5\n", ("FILE", "line", "got 6")),
    "of bytes": (lambda rows: bytes(range(256)), ("FILE",)),
    "with null bytes": (lambda rows: text(rows).replace(b"red", b"r\0d", 1), ("line", "'kind'")),
    "of numbers of Excel": (lambda rows: b"PK\3\4" + bytes(40), ("FILE",)),
    "with NA": (value("hours", "NA"), ("'hours'", "FILE", "line 2")),
    "with an empty cell": (value("hours", ""), ("'hours'", "FILE", "line 2")),
    "with a blank cell": (value("hours", "  "), ("'hours'", "FILE", "line 2")),
    "with nan": (value("hours", "nan"), ("'hours'", "FILE", "line 2")),
    "with an unknown mark": (value("hours", "?"), ("'hours'", "FILE", "line 2")),
    "with NA as a category": (value("kind", "NA"), ("'kind'", "FILE", "line 2")),
    "with NA as a truth value": (value("late", "NA"), ("'late'", "FILE", "line 2")),
    "with inf": (value("hours", "inf"), ("'hours'", "'inf'")),
    "with 1e400": (value("hours", "1e400"), ("'hours'", "1e400")),
    "with 1e308": (value("hours", "1e308"), ("'hours'", "1e+308")),
    "with a decimal comma": (value("hours", "1,5"), ("'hours'", "'1,5'", "decimal point")),
    "with a thousands separator": (value("hours", "1,234.5"), ("'hours'", "'1,234.5'")),
    "with a hexadecimal number": (value("hours", "0x1F"), ("'hours'", "'0x1F'")),
    "with an underscore": (value("hours", "1_0"), ("'hours'", "'1_0'")),
    "with a date": (value("hours", "2024-01-31"), ("'hours'", "'2024-01-31'")),
    "with a time": (value("hours", "1:30"), ("'hours'", "'1:30'")),
    "with per cent": (value("hours", "50%"), ("'hours'", "'50%'")),
    "with a unit": (value("hours", "3 h"), ("'hours'", "'3 h'")),
    "with a word": (value("hours", "three"), ("'hours'", "'three'")),
    "with digits of another script": (value("hours", "٣"), ("'hours'", "٣")),
    "with a formula": (value("hours", "=A1+1"), ("'hours'", "'=A1+1'")),
    "with an unknown level": (value("kind", "violet"), ("'kind'", "'violet'", "blue, green, red")),
    "with a level in capitals": (value("kind", "Red"), ("'kind'", "'Red'", "did you mean 'red'")),
    "with a code for a level": (value("kind", "2"), ("'kind'", "'2'", "blue, green, red")),
    "with a code for a truth value": (value("late", "1"), ("'late'", "'1'", "false, true")),
    "with a truth value of another kind": (value("late", "yes"), ("'late'", "'yes'", "false, true")),
}  # fmt: skip
TARGETS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "without a target": (rowwise(lambda rows: without(rows, "score")), ("target", "'score'")),
    "with half a target": (value("score", ""), ("target", "'score'", "line 2")),
    "with NA as a target": (value("score", "NA"), ("target", "'score'", "line 2")),
    "with a word as a target": (value("score", "good"), ("'score'", "'good'")),
    "with inf as a target": (value("score", "inf"), ("'score'", "'inf'")),
    "with 1e308 as a target": (value("score", "1e308"), ("'score'", "1e+308")),
    "with a comma in a target": (value("score", "55,5"), ("'score'", "'55,5'")),
    "with a date as a target": (value("score", "2024-01-31"), ("'score'", "'2024-01-31'")),
    "with a target named otherwise": (rowwise(lambda rows: named(rows, score="Score")), ("target", "'score'")),
    "with two usual targets": (rowwise(lambda rows: beside(named(rows, score="label"), "target", "1")),
                               ("target", "'label'", "'target'", "'score'")),
}  # fmt: skip
WELL: dict[str, Change] = {
    "as they are": text,
    "in another order": rowwise(lambda rows: [row[::-1] for row in rows]),
    "with a byte order mark": lambda rows: b"\xef\xbb\xbf" + text(rows),
    "with lines of Windows": lambda rows: text(rows).replace(b"\n", b"\r\n"),
    "with lines of an old Mac": lambda rows: text(rows).replace(b"\n", b"\r"),
    "with blank lines": lambda rows: b"\n" + text(rows).replace(b"\n", b"\n\n") + b"\n\n",
    "without a last newline": lambda rows: text(rows).rstrip(b"\n"),
    "with all in quotes": lambda rows: b"\n".join(b",".join(b'"%s"' % c.encode() for c in row) for row in rows),
    "with spaces": lambda rows: text(rows).replace(b",", b" , "),
    "with another column": rowwise(lambda rows: beside(rows, "comment", "fine")),
    "with a newline in quotes": rowwise(lambda rows: beside(rows, "comment", "two\nlines")),
    "with commas in quotes": rowwise(lambda rows: beside(rows, "comment", "a, b; c")),
    "with quotes in quotes": rowwise(lambda rows: beside(rows, "comment", 'a "b" c')),
    "with gaps elsewhere": rowwise(lambda rows: beside(rows, "comment", "", "NA")),
    "with a column of no name": rowwise(lambda rows: beside(rows, "", "0", "1")),
    "with a column of unicode": rowwise(lambda rows: beside(rows, "名 ü", "漢")),
    "with the group": rowwise(lambda rows: beside(rows, "school", "s00")),
    "with ids as floats": rowwise(lambda rows: beside(rows, "school", "1.0")),
    "with no group in a row": rowwise(lambda rows: beside(rows, "school", "NA", "s01")),
    "with huge ids": rowwise(lambda rows: beside(rows, "school", "9007199254740993")),
    "with an exponent": lambda rows: text(rows).replace(b"1.5,", b"15e-1,").replace(b"9,", b"9e0,"),
    "with signs and points": lambda rows: text(rows).replace(b"8,", b"+8.,").replace(b"9,", b"+9.0,"),
    "with many digits": lambda rows: text(rows).replace(b"\n8,", b"\n8.000000000000000000000001,"),
    "with truth values in capitals": lambda rows: text(rows).replace(b"true", b"True").replace(b"false", b"FALSE"),
}  # fmt: skip


def with_file(side: str, change: Change, folder: Path) -> Any:
    files = {"support": text(SUPPORT), "query": text(QUERY)} | {side: change(SUPPORT if side == "support" else QUERY)}
    return answer(trained(), files["support"], files["query"], folder)


def classes(change: Change, folder: Path) -> Any:
    return answer(trained("grade"), change(support_of("grade")), text(QUERY), folder)


def path_of(kind: str, folder: Path) -> Any:
    """A support that is no CSV file by its path."""
    (folder / "q.csv").write_bytes(text(QUERY))
    path = folder / f"s{'.npz' if kind.startswith('npz') else '.csv'}"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to(folder / "nowhere")
    elif kind.startswith("npz"):
        path.write_bytes(npz(kind))
    return cli("adapt", trained(), "--support", path, "--query", folder / "q.csv")


NUMBERS = {"hours": np.asarray([1.5, 2, 8]), "kind": np.asarray(["red", "green", "blue"]),
           "late": np.asarray([True, False, True]), "score": np.asarray([55, 58.5, 75])}  # fmt: skip
ARRAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "npz without a column": ({"hours": None}, ("'hours'",)),
    "npz of another length": ({"hours": np.asarray([1.5, 2])}, ("rows",)),
    "npz with nan": ({"hours": np.asarray([1.5, np.nan, 8])}, ("'hours'", "row 1")),
    "npz with inf in the target": ({"score": np.asarray([1.5, np.inf, 8])}, ("'score'", "row 1")),
    "npz of two columns in one": ({"hours": np.ones((3, 2))}, ("'hours'", "width 1, got 2")),
    "npz of objects": ({"hours": np.asarray([1.5, None, 8], object)}, ("s.npz",)),
    "npz of complex numbers": ({"hours": np.asarray([1j, 2, 8])}, ("'hours'", "complex")),
    "npz of dates": ({"hours": np.asarray(["2024-01-01"] * 3, "datetime64[D]")}, ("'hours'", "2024-01-01")),
    "npz of a single number": ({"hours": np.asarray(1.5)}, ("'hours'", "a single value")),
    "npz of no rows": ({name: values[:0] for name, values in NUMBERS.items()}, ("rows",)),
    "npz of codes for levels": ({"kind": np.asarray([0, 1, 2])}, ("'kind'", "'0'")),
    "npz of codes for truth values": ({"late": np.asarray([0, 1, 0])}, ("'late'", "'0'")),
}  # fmt: skip


def npz(kind: str) -> bytes:
    if kind == "npz of text":
        return text(SUPPORT)
    file = io.BytesIO()
    np.savez(file, **{name: values for name, values in (NUMBERS | ARRAYS[kind][0]).items() if values is not None})
    return file.getvalue()


def good_npz(folder: Path) -> Any:
    file = io.BytesIO()
    np.savez(file, **NUMBERS)
    return answer(trained(), file.getvalue(), text(QUERY), folder, (".npz", ".csv"))


def one_row(side: str, folder: Path) -> Any:
    """One row: of the query it is the first of the plain answer, of the support a finite one."""
    return with_file(side, lambda rows: text(rows[:2]), folder)


def words(says: tuple[str, ...], side: str) -> tuple[str, ...]:
    return tuple(f"{side[0]}.csv" if word == "FILE" else word for word in says)


def cases() -> list[Case]:
    found = []
    for side in ("support", "query"):
        found += [
            Case(f"{side} {name}", partial(with_file, side, change), words(says, side))
            for name, (change, says) in BAD.items()
        ]
        found += [
            Case(f"{side} {name}", partial(with_file, side, change), right=as_plain) for name, change in WELL.items()
        ]
    found += [
        Case(f"support {name}", partial(with_file, "support", change), says) for name, (change, says) in TARGETS.items()
    ]
    for name in ("target", "label", "y"):
        change = rowwise(lambda rows, name=name: named(rows, score=name))
        found.append(Case(f"support with its target as {name}", partial(with_file, "support", change), right=as_plain))
    query = rowwise(lambda rows: beside(rows, "score", "", "NA"))
    found.append(Case("query with half a target", partial(with_file, "query", query), right=as_plain))
    found += [
        Case("query of one row", partial(one_row, "query"), right=lambda rows: same(rows, plain()[:1])),
        Case("support of one row", partial(one_row, "support"),
             right=lambda rows: [0 < row["5 %"] < row["mean"] < row["95 %"] < 200 for row in rows] == [True, True]),
        Case("support of an npz", good_npz, right=as_plain),
        Case("support named txt", lambda f: answer(trained(), text(SUPPORT), text(QUERY), f, (".txt", ".csv")),
             right=as_plain),
    ]  # fmt: skip
    paths = {"a folder": ("s.csv", "folder"), "a pipe": ("s.csv", "regular file"), "nowhere": ("s.csv", "no such"),
             "a link to nothing": ("s.csv", "no such"), "npz of text": ("s.npz",)}  # fmt: skip
    paths |= {name: says for name, (_, says) in ARRAYS.items()}
    found += [Case(f"support is {kind}", partial(path_of, kind), says) for kind, says in paths.items()]
    of_classes = {
        "an unknown class": (value("grade", "lowest"), ("'lowest'", "low", "did you mean")),
        "a class in capitals": (value("grade", "LOW"), ("'LOW'",)),
        "a code of a class": (value("grade", "0"), ("'0'", "high, low, top")),
        "no class": (value("grade", ""), ("target", "'grade'", "line 2")),
        "two classes in a cell": (value("grade", "low,high"), ("'low,high'",)),
    }
    found += [
        Case(f"support of classes with {name}", partial(classes, change), says)
        for name, (change, says) in of_classes.items()
    ]

    def kept(rows: list[dict[str, Any]]) -> bool:
        """Every class has its own column, whatever the support shows."""
        return all(set(row) == {"query", "prediction", "p(high)", "p(low)", "p(top)"} for row in rows) and all(
            abs(sum(v for k, v in row.items() if k.startswith("p(")) - 1) < 1e-3 for row in rows
        )

    shows = {"all classes": text, "one class": lambda rows: text(rows[:2]),
             "classes in another order": lambda rows: text([rows[0], *rows[:0:-1]])}  # fmt: skip
    found += [
        Case(f"support of classes with {name}", partial(classes, change), right=kept) for name, change in shows.items()
    ]
    return found
