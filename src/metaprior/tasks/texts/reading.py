"""Labelled texts from the user's files: CSV, TSV, JSON, JSON lines, plain lines, or a folder by class."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metaprior.core.named import nearest
from metaprior.tasks.checks import DataError
from metaprior.tasks.texts.words import PACKED, kind_of, read_text

TEXTS = ("text", "texts", "sentence", "utterance", "query", "question", "content", "x")
LABELS = ("label", "labels", "class", "category", "intent", "target", "y")
KINDS = (".csv", ".tsv", ".json", ".jsonl", ".txt")


class Texts(NamedTuple):
    """Texts, and the label of each (None where the file has none)."""

    texts: list[str]
    labels: list[Any] | None


def read_texts(path: str | Path, *, text: str | None = None, label: str | None = None, labelled: bool = True) -> Texts:
    """Texts with their labels.

    Args:
        path: a CSV or TSV file with a header; JSON: a list of objects or of [text, label] pairs, an object of lists of
            texts by label, or of lists of such pairs by part; JSON lines; a text file with a text a line (no labels);
            or a folder of class folders of text files, or of text files named by class with a text a line. Files may
            end in .xz or .gz.
        text, label: columns (or keys of the objects); by default the first there is of the usual names.
        labelled: whether labels are needed.

    White space around a label does not count.

    Raises:
        DataError: no such file, nothing in it, unknown columns (naming those there are), an empty text or label, or a
            label that is text in one row and a number in another.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"path: came {path}, which does not exist; needs a CSV or JSON file, or a folder by class")
    found = _from_folder(path) if path.is_dir() else _from_file(path, text, label, labelled)
    if not found.texts:
        raise DataError(f"{path}: came no text, needs one at least")
    if labelled and found.labels is None:
        raise DataError(f"{path}: came texts without labels, needs a column 'label' or text files in class folders")
    for row, value in enumerate(found.texts):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{path}: came {value!r} as the text of row {row}, needs words; leave such rows out")
    if found.labels is None:
        return found
    labels = [value.strip() if isinstance(value, str) else value for value in found.labels]
    kinds: dict[str, type] = {}
    for row, value in enumerate(labels):
        if value is None or value == "":
            raise DataError(f"{path}: came no label in row {row}; fill it in or leave the row out")
        if kinds.setdefault(str(value), type(value)) is not type(value):
            raise DataError(f"{path}: has the label {value!r} as text and as a number; write it one way")
    return found._replace(labels=labels)


def _from_file(path: Path, text: str | None, label: str | None, labelled: bool) -> Texts:
    kind = kind_of(path)
    if kind not in KINDS:
        raise DataError(f"{path}: came a {kind or 'nameless'} file, needs one of {', '.join(KINDS)}, .xz or .gz after")
    content = read_text(path)
    if kind == ".txt":
        return Texts([line for line in content.splitlines() if line.strip()], None)
    if kind in (".csv", ".tsv"):
        rows = _table(content, "\t" if kind == ".tsv" else ",", path)
    else:
        try:
            lines = [line for line in content.splitlines() if line.strip()] if kind == ".jsonl" else None
            rows = json.loads(content) if lines is None else [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: is not JSON ({error}); correct it") from error
    return _from_rows(rows, path, text, label, labelled)


def _table(content: str, delimiter: str, path: Path) -> list[dict[str, str]]:
    lines = [row for row in csv.reader(io.StringIO(content), delimiter=delimiter) if row]
    if len(lines) < 2:
        raise DataError(f"{path}: came {len(lines)} lines, needs a header and a row at least")
    for line, row in enumerate(lines[1:], start=2):
        if len(row) != len(lines[0]):
            raise DataError(f"{path}: row {line} came {len(row)} values, needs {len(lines[0])}, one a column; quote "
                            "texts with commas in them")  # fmt: skip
    if twice := [name for name in lines[0] if name and lines[0].count(name) > 1]:
        raise DataError(f"{path}: column {twice[0]!r} stands {lines[0].count(twice[0])} times; give each its own name.")
    return [dict(zip(lines[0], row, strict=True)) for row in lines[1:]]


def _from_rows(rows: Any, path: Path, text: str | None, label: str | None, labelled: bool) -> Texts:
    if isinstance(rows, dict):
        if all(_are(values, str) for values in rows.values()):
            pairs = [(value, name) for name, values in rows.items() for value in values]
            return Texts([t for t, _ in pairs], [name for _, name in pairs])
        rows = [row for values in rows.values() for row in (values if isinstance(values, list) else [values])]
    if _are(rows, str):
        return Texts(rows, None)
    if _are(rows, list) and all(len(row) == 2 for row in rows):
        return Texts([row[0] for row in rows], [row[1] for row in rows])
    if not _are(rows, dict):
        raise DataError(f"{path}: needs a list of objects, of [text, label] pairs, or lists of texts by label")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    chosen = _column("text", text, TEXTS, columns, path)
    goal = _column("label", label, LABELS, columns, path, needed=labelled)
    return Texts([row.get(chosen) for row in rows], None if goal is None else [row.get(goal) for row in rows])


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _column(
    argument: str, name: str | None, usual: Sequence[str], columns: list[str], path: Path, needed: bool = True
) -> str | None:
    if name is not None and (name in columns or needed):
        if name not in columns:
            listed = ", ".join(map(repr, columns))
            raise DataError(f"{argument}: came column {name!r}, but {path} has {listed}{nearest(name, columns)}")
        return name
    found = next((column for column in usual if column in columns), None)
    if found is None and needed:
        raise DataError(
            f"{argument}: {path} has columns {', '.join(map(repr, columns))}, none of which is one of the usual names "
            f"({', '.join(usual)}); say which by {argument}="
        )
    return found


def _from_folder(path: Path) -> Texts:
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and kind_of(file) == ".txt"]
    if not files:
        raise DataError(f"{path}: came a folder without text files (.txt), needs class folders of them")
    nested = [file for file in files if file.parent != path]
    if nested and len(nested) < len(files):
        alone = next(file for file in files if file.parent == path)
        raise DataError(f"{path}: came {alone.name} beside class folders, needs every text file in one")
    pairs: Iterable[tuple[str, str]]
    if nested:
        pairs = [(read_text(file), file.parent.relative_to(path).as_posix()) for file in files]
    else:
        pairs = [(line, _stem(file)) for file in files for line in read_text(file).splitlines() if line.strip()]
    return Texts([text for text, _ in pairs], [label for _, label in pairs])


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix.lower() in PACKED else file.stem
