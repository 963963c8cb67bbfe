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
    """Texts and their labels.

    Attributes:
        texts: The texts.
        labels: The label of each text; None if the file has no labels.
    """

    texts: list[str]
    labels: list[Any] | None


def read_texts(path: str | Path, *, text: str | None = None, label: str | None = None, labelled: bool = True) -> Texts:
    """Reads texts and their labels; white space around a label is ignored.

    Args:
        path: A CSV or TSV file with a header. Or a JSON file: a list of objects, a list of [text, label] pairs, an
            object with a list of texts per label, or an object with a list of such pairs per part. Or a file of JSON
            lines. Or a text file with one text per line, which has no labels. Or a folder of class folders of text
            files, or of text files that are named by class and have one text per line. Files may end in .xz or .gz.
        text: The column (or key of the objects) of the texts. By default the first that exists of the usual names.
        label: The column (or key of the objects) of the labels. By default the first that exists of the usual names.
        labelled: Whether labels are required.

    Returns:
        The texts and labels.

    Raises:
        DataError: No such file, no texts, unknown columns (naming those that exist), an empty text or label, or a label
            that is text in one row and a number in another.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"path must be a CSV or JSON file, or a folder by class, got {path}, which does not exist.")
    found = _from_folder(path) if path.is_dir() else _from_file(path, text, label, labelled)
    if not found.texts:
        raise DataError(f"{path} must hold at least one text, got none.")
    if labelled and found.labels is None:
        raise DataError(
            f"{path} must have labels, got texts without labels. Add a column 'label' or use text files in class "
            "folders."
        )
    for row, value in enumerate(found.texts):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{path} must have a text in each row, got {value!r} in row {row}. Leave such rows out.")
    if found.labels is None:
        return found
    labels = [value.strip() if isinstance(value, str) else value for value in found.labels]
    kinds: dict[str, type] = {}
    for row, value in enumerate(labels):
        if value is None or value == "":
            raise DataError(
                f"{path} must have a label in each row, got none in row {row}. Fill it in or leave the row out."
            )
        if kinds.setdefault(str(value), type(value)) is not type(value):
            raise DataError(f"{path} has the label {value!r} as text and as a number. Use one of them.")
    return found._replace(labels=labels)


def _from_file(path: Path, text: str | None, label: str | None, labelled: bool) -> Texts:
    kind = kind_of(path)
    if kind not in KINDS:
        raise DataError(
            f"{path} must end in one of {', '.join(KINDS)}, or these with .xz or .gz after, got {kind or 'no suffix'}."
        )
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
            raise DataError(f"{path} is not JSON ({error}). Correct it.") from error
    return _from_rows(rows, path, text, label, labelled)


def _table(content: str, delimiter: str, path: Path) -> list[dict[str, str]]:
    lines = [row for row in csv.reader(io.StringIO(content), delimiter=delimiter) if row]
    if len(lines) < 2:
        raise DataError(f"{path} must have a header and at least one row, got {len(lines)} lines.")
    for line, row in enumerate(lines[1:], start=2):
        if len(row) != len(lines[0]):
            raise DataError(
                f"{path}: row {line} must have {len(lines[0])} values, one per column, got {len(row)}. Quote texts "
                "that contain commas."
            )
    if twice := [name for name in lines[0] if name and lines[0].count(name) > 1]:
        raise DataError(
            f"{path}: column {twice[0]!r} occurs {lines[0].count(twice[0])} times. Give each a different name."
        )
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
        raise DataError(
            f"{path} must hold a list of objects, a list of [text, label] pairs, or a list of texts per label."
        )
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
            near = nearest(name, columns) or "."
            raise DataError(f"{argument} must be a column of {path} ({listed}), got {name!r}{near}")
        return name
    found = next((column for column in usual if column in columns), None)
    if found is None and needed:
        raise DataError(
            f"{argument}: {path} has columns {', '.join(map(repr, columns))}, none of which is one of the usual names "
            f"({', '.join(usual)}). Set {argument}= to one of its columns."
        )
    return found


def _from_folder(path: Path) -> Texts:
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and kind_of(file) == ".txt"]
    if not files:
        raise DataError(f"{path} must contain class folders of text files (.txt), got a folder without any.")
    nested = [file for file in files if file.parent != path]
    if nested and len(nested) < len(files):
        alone = next(file for file in files if file.parent == path)
        raise DataError(f"{path} must have every text file in a class folder, got {alone.name} beside them.")
    pairs: Iterable[tuple[str, str]]
    if nested:
        pairs = [(read_text(file), file.parent.relative_to(path).as_posix()) for file in files]
    else:
        pairs = [(line, _stem(file)) for file in files for line in read_text(file).splitlines() if line.strip()]
    return Texts([text for text, _ in pairs], [label for _, label in pairs])


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix.lower() in PACKED else file.stem
