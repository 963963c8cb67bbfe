"""Columns of the user's tables as text, and strict conversion to numbers, ids and categories.

The columns of a CSV file stay text until it is known what each is for. Text can become a number later, but an id that
was read as a number (9007199254740993, 007, 1_0, 1e1) cannot be recovered.
"""

import csv
import re
import warnings
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from metaprior.core.named import nearest
from metaprior.tasks.checks import DataError
from metaprior.tasks.limits import open_arrays
from metaprior.tasks.store import reading

MISSING = {"", "na", "nan", "n/a", "#n/a", "<na>", "null", "none", "?"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
WHOLE = re.compile(r"0|-?[1-9]\d*", re.ASCII)
DIGITS = re.compile(r"[0-9eE+\-.\n]*", re.ASCII)
COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}.*|\d{1,4}[/.]\d{1,2}[/.]\d{1,4}.*|\d{1,2}:\d{2}.*", re.ASCII)
TRUTH = ("false", "true")
EXACT = 2**53  # float64 represents whole numbers up to this size exactly
LOST = 1e-2  # largest rounding error that is accepted, as a fraction of the column's range
MOST_LEVELS = 100


def is_categorical(values: Any) -> bool:
    """Returns whether a column is a pandas Categorical."""
    return hasattr(getattr(values, "dtype", None), "categories")


def as_array(values: Any) -> np.ndarray:
    """Returns a column as an array; pandas Categoricals become text, and dates become text in ISO form."""
    if is_categorical(values):
        given = np.asarray(values, object)
        return np.array([None if v is None or v != v else str(v) for v in given.tolist()], object)
    array = np.asanyarray(values)
    return dates_as_text(array) if array.dtype.kind == "M" else array


def dates_as_text(values: np.ndarray) -> np.ndarray:
    """Returns dates of any numpy unit as text.

    Args:
        values: Datetime64, of any shape.

    Returns:
        Text such as 2024-03-01 or 2024-03-01T12:00:00, of the same shape; None for a missing date.
    """
    written = np.datetime_as_string(values.astype("M8[us]"))
    cut = [text.removesuffix(".000000").removesuffix("T00:00:00") for text in written.reshape(-1).tolist()]
    return np.array([None if text == "NaT" else text for text in cut], object).reshape(values.shape)


class Columns(dict[str, np.ndarray]):
    """Columns by name, with the place of each row in its file.

    Attributes:
        path: The file; None for columns that come from Python.
        lines: The line of each row in the file; None if unknown.
    """

    def __init__(self, columns: Mapping[str, Any], path: Path | None = None, lines: Sequence[int] | None = None):
        """Converts the columns to arrays.

        Args:
            columns: Columns by name; names are converted to text.
            path: The file.
            lines: The line of each row in the file.

        Raises:
            DataError: Two columns of the same name.
        """
        super().__init__({str(name): as_array(values) for name, values in columns.items()})
        if len(self) < len(columns):
            names = [str(name) for name in columns]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"columns: {names.count(twice)} columns are named {twice!r}. Give each a different name.")
        self.path, self.lines = path, lines

    @property
    def rows(self) -> int:
        """The number of rows, which is the same for all columns.

        Raises:
            DataError: Columns of different lengths, or no rows.
        """
        sizes = {name: len(values) if values.ndim else None for name, values in self.items()}
        first = next(iter(sizes), "")
        for name, size in sizes.items():
            if not size or size != sizes[first]:
                shown = {None: "a single value", 0: "no rows"}.get(size, f"{size} rows")
                raise DataError(
                    f"columns must have equal lengths, got {shown} in {name!r} and {sizes[first]} in {first!r}."
                )
        return sizes.get(first) or 0

    def place(self, row: int) -> str:
        """Returns where a row is, for errors: its number, and its line in the file if known."""
        return f"row {row}" if self.lines is None else f"row {row} (line {self.lines[row]} of {self.path})"

    def find(self, name: str, argument: str) -> np.ndarray:
        """Returns one column; a column of width k may also be stored as columns name[0], name[1], ...

        Args:
            name: The name of the column.
            argument: The argument that names it, for errors.

        Raises:
            DataError: No such column (listing those that exist, and the nearest name), or a column without rows.
        """
        if name not in self and f"{name}[0]" in self:
            wide = [f"{name}[{i}]" for i in range(len(self)) if f"{name}[{i}]" in self]
            return np.stack([self[part] for part in wide], 1)
        if name not in self:
            listed = ", ".join(self) if len(self) <= 20 else f"{', '.join(list(self)[:20])}, ..."
            near = nearest(name, list(self)) or "."
            raise DataError(f"{argument} must be one of {listed}, got {name!r}{near}")
        if not self[name].ndim or not len(self[name]):
            came = "no rows" if self[name].ndim else "a single value"
            raise DataError(f"{argument}: column {name!r} must have one row per example and at least one, got {came}.")
        return self[name]


def read_columns(path: str | Path) -> Columns:
    """Reads the columns of a CSV file as text, stripped of white space, or the arrays of an NPZ file.

    Args:
        path: A file that ends in .npz, or a CSV file with a header.

    Returns:
        The columns by name.

    Raises:
        DataError: No such file, no header, a repeated name, rows of different lengths, or a damaged file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path} must be a CSV or NPZ file, got a folder.")
    with reading(path, "Correct it, or delete it and copy it again."):
        if path.suffix.lower() == ".npz":
            with open_arrays(path) as file:
                return Columns({name: file[name] for name in file.files}, path)
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader, rows, lines = csv.reader(file, strict=True), [], []
            try:
                for row in reader:
                    if row:
                        rows.append([cell.strip() for cell in row])
                        lines.append(reader.line_num)
            except csv.Error as error:
                raise DataError(f"{path}: line {reader.line_num} is not CSV ({error}). Correct it.") from error
    if len(rows) < 2:
        raise DataError(f"{path} must have a header and at least one row, got {len(rows)} lines.")
    header = _header(rows[0], path)
    for line, row in zip(lines[1:], rows[1:], strict=True):
        if len(row) != len(header):
            raise DataError(f"{path}: line {line} must have {len(header)} values, one per column, got {len(row)}.")
    columns = {name: _text_array(values) for name, *values in zip(header, *rows[1:], strict=True) if name}
    return Columns(columns, path, lines[1:])


def _header(names: list[str], path: Path) -> list[str]:
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise DataError(f"{path}: columns are separated by {other!r}. Save it with commas between columns.")
    if any(names) and all(NUMBER.fullmatch(name) for name in names if name):
        raise DataError(f"{path}: the first line holds numbers ({', '.join(names[:3])}). Add a line of column names.")
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DataError(
            f"{path}: column {twice[0]!r} occurs {names.count(twice[0])} times. Give each a different name."
        )
    return names


def _text_array(values: list[str]) -> np.ndarray:
    # Fixed-width text takes the space of the widest cell in every row.
    return np.asarray(values, str if max(map(len, values)) <= 256 else object)


def is_text(values: np.ndarray) -> bool:
    """Returns whether a column holds text, of any type."""
    if values.dtype == object:
        return any(isinstance(value, str | bytes) for value in values.flat)
    return values.dtype.kind in "US"


def as_text(values: np.ndarray) -> list[str]:
    """Returns each value as text, stripped of white space."""
    flat = values.tolist()
    return [(v.decode() if isinstance(v, bytes) else str(v)).strip() for v in flat]


def missing(values: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Returns which rows lack a value or hold NaN or infinity."""
    if np.ma.isMaskedArray(values):
        lost = np.ma.getmaskarray(values).reshape(len(values), -1).any(1)
        return lost | missing(np.asarray(values.filled(0) if values.dtype.kind in "fiub" else values))
    if values.dtype.kind in "fc":
        return np.asarray(~np.isfinite(values.reshape(len(values), -1)).all(1))
    if values.dtype.kind in "mM":
        return np.isnat(values)
    if values.dtype.kind in "US":
        return np.asarray([value.lower() in MISSING for value in as_text(values)], bool)
    if values.dtype == object:
        return np.asarray([any(map(_lacks, np.atleast_1d(row))) for row in values], bool)
    return np.zeros(len(values), bool)


def _lacks(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return as_text(np.asarray([value], object))[0].lower() in MISSING
    if isinstance(value, Real):
        return not np.isfinite(float(value)) if isinstance(value, float | np.floating) else False
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def refuse_missing(values: np.ndarray, name: str, columns: Columns, argument: str) -> None:
    """Checks that a column has no missing value.

    Args:
        values: The column, [n] or [n, k].
        name: Its name.
        columns: The table, for the place of a row.
        argument: The argument that names the column, for errors.

    Raises:
        DataError: A missing value; the error names the column and the first such row.
    """
    lost = missing(values)
    if lost.any():
        row = int(np.flatnonzero(lost)[0])
        also = " or NaN" if argument == "features" else ""
        raise DataError(
            f"{argument} must have no missing values{also}, got one in column {name!r}, {columns.place(row)} "
            f"({lost.sum()} such rows). Fill them in or leave those rows out."
        )


def as_numbers(values: np.ndarray, name: str, columns: Columns, argument: str = "features") -> Float[np.ndarray, "n k"]:
    """Converts a column to float64.

    Text is read strictly: digits, a decimal point and an exponent. '1_0', '1,5' and 'infinity' are errors.

    Args:
        values: The column, [n] or [n, k].
        name: Its name.
        columns: The table, for the place of a row.
        argument: The argument that names the column, for errors.

    Returns:
        The numbers [n, k], with k = 1 except for arrays of several columns.

    Raises:
        DataError: Anything that is not a number, a missing value, or whole numbers whose differences float64 cannot
            represent. The error names column, row and value.
    """
    refuse_missing(values, name, columns, argument)
    values = np.asarray(values)
    flat = values.reshape(len(values), -1)
    if is_text(flat) or flat.dtype == object:
        numbers = _parsed(flat, name, columns, argument)
    elif flat.dtype.kind in "fiub":
        numbers = flat.astype(float)
        _warn_of_few_digits(flat, name, argument)
    else:
        fix = "the real and imaginary parts" if flat.dtype.kind == "c" else "numbers, e.g. days since a start"
        raise DataError(f"{argument}: column {name!r} holds {flat.dtype} values. Give {fix}.")
    if not np.isfinite(numbers).all():
        row, at = np.argwhere(~np.isfinite(numbers))[0]
        raise DataError(
            f"{argument}: column {name!r} has {str(flat[row, at])!r} in {columns.place(row)}, too large for a float64 "
            "number. Rescale it."
        )
    if flat.dtype.kind not in "fb" and np.abs(numbers).max(initial=0) > EXACT:
        _refuse_lost_digits(flat, numbers, name, argument)
    return numbers


def _parsed(flat: np.ndarray, name: str, columns: Columns, argument: str) -> np.ndarray:
    if flat.dtype.kind in "US" and (read := _all_numbers(as_text(flat.ravel()))) is not None:
        return np.asarray(read).reshape(flat.shape)
    numbers = np.empty(flat.shape)
    for row, cells in enumerate(flat.tolist()):
        for at, cell in enumerate(cells):
            if isinstance(cell, str | bytes):
                text = as_text(np.asarray([cell], object))[0]
                if not NUMBER.fullmatch(text):
                    raise _not_a_number(cell, name, columns.place(row), argument)
                numbers[row, at] = float(text)
            elif isinstance(cell, Real | Decimal | np.bool_):
                numbers[row, at] = float(cell)
            else:
                raise _not_a_number(cell, name, columns.place(row), argument)
    return numbers


def _all_numbers(cells: list[str]) -> list[float] | None:
    """Returns the cells as numbers if all of them match NUMBER, else None."""
    if DIGITS.fullmatch("\n".join(cells)) is None:
        return None
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return None


def _not_a_number(cell: Any, name: str, place: str, argument: str) -> DataError:
    if isinstance(cell, str) and COMMA.fullmatch(cell):
        return DataError(
            f"{argument}: column {name!r} has {cell!r} in {place}, a number with a comma. Write a decimal point and no "
            "thousands separator."
        )
    fix = "name the column in `categories`"
    fix = fix if argument == "features" else "set classification=true and a likelihood of classes"
    return DataError(
        f"{argument} must be numbers, got {cell!r} in column {name!r}, {place}. Correct it, or {fix} if these are "
        "categories."
    )


def _refuse_lost_digits(flat: np.ndarray, numbers: np.ndarray, name: str, argument: str) -> None:
    """Raises if float64 rounds whole numbers beyond 2^53 by more than a fraction LOST of their range."""
    for column, rounded in zip(flat.T.tolist(), numbers.T.tolist(), strict=True):
        cells = [cell.strip() if isinstance(cell, str) else cell for cell in column]
        if not all(isinstance(cell, int) or (isinstance(cell, str) and WHOLE.fullmatch(cell)) for cell in cells):
            continue
        exact = [int(cell) for cell in cells]
        error, spread = max(abs(a - int(b)) for a, b in zip(exact, rounded, strict=True)), max(exact) - min(exact)
        if error > LOST * spread and spread > 0:
            raise DataError(
                f"{argument}: column {name!r} has whole numbers of {max(map(abs, exact)):.1e} that differ by only "
                f"{spread}, which float64 cannot represent. Subtract a constant first."
            )


def _warn_of_few_digits(flat: np.ndarray, name: str, argument: str) -> None:
    if flat.dtype.kind != "f" or flat.dtype.itemsize >= 8:
        return
    with np.errstate(over="ignore"):
        spread, step = np.ptp(flat, 0).astype(float), np.spacing(np.abs(flat).max(0)).astype(float)
    few = (spread > 0) & (spread < 50 * step)
    if few.any():
        warnings.warn(
            f"{argument}: column {name!r} is {flat.dtype} with {(spread[few] / step[few]).min():.0f} rounding steps "
            "between its smallest and largest value. Its digits were lost before it was passed. Read it as float64.",
            stacklevel=2,
        )


def kind_of(name: str, columns: Columns, argument: str = "features") -> str:
    """Returns what a column holds: 'number', 'truth value' or 'category'.

    Args:
        name: The name of the column.
        columns: The table.
        argument: The argument that names the column, for errors.

    Raises:
        DataError: A missing value, numbers beside words, decimal commas, dates, or text with a different level in most
            rows, which is not a category. Each error states the fix.
    """
    values = columns.find(name, argument)
    refuse_missing(values, name, columns, argument)
    if not is_text(values):
        return "truth value" if values.dtype.kind == "b" else "number"
    if values.ndim > 1:
        return "number"
    cells = as_text(values)
    if _all_numbers(cells) is not None:
        return "number"
    numeric = [NUMBER.fullmatch(cell) is not None for cell in cells]
    commas = next((i for i, cell in enumerate(cells) if COMMA.fullmatch(cell)), None)
    if any(numeric) or commas is not None:
        row = commas if commas is not None else numeric.index(False)
        raise _not_a_number(cells[row], name, columns.place(row), argument)
    levels = set(cells)
    if {level.lower() for level in levels} <= set(TRUTH):
        return "truth value"
    advice = "Leave the column out (`features`), encode it as numbers, or name it in `categories` if it is one."
    advice = "Give numbers, or classification=true if these are classes." if argument == "target" else advice
    if all(DATE.fullmatch(cell) for cell in cells):
        raise DataError(f"{argument}: column {name!r} holds dates or times ({cells[0]!r}). {advice}")
    if len(levels) > MOST_LEVELS or (len(levels) > 5 and 2 * len(levels) > len(cells)):
        raise DataError(
            f"{argument}: column {name!r} has {len(levels)} different texts in {len(cells)} rows ({cells[0]!r}, ...), "
            f"too many for a category. {advice}"
        )
    return "category"


def as_ids(values: np.ndarray, name: str, columns: Columns, argument: str) -> list[Any]:
    """Returns ids or class labels without changing them.

    Args:
        values: The column, [n].
        name: Its name.
        columns: The table, for the place of a row.
        argument: The argument that names the column, for errors.

    Returns:
        Text becomes integers if every cell is written as one, else it stays text. Other types stay as they are.

    Raises:
        DataError: A missing value, or floats that are too large to distinguish ids.
    """
    if values.ndim != 1:
        raise DataError(f"{argument}: column {name!r} must have one value per row, got shape {values.shape}.")
    refuse_missing(values, name, columns, argument)
    if values.dtype.kind == "f":
        limit = 2.0 ** (np.finfo(values.dtype).nmant + 1)
        if len(values) and np.abs(values).max() >= limit:
            row = int(np.abs(values).argmax())
            raise DataError(
                f"{argument}: column {name!r} has {values[row]!r} in {columns.place(row)}. {values.dtype} numbers of "
                "this size cannot distinguish ids. Give integers or text."
            )
    if not is_text(values) or (values.dtype == object and not all(isinstance(v, str | bytes) for v in values)):
        return values.tolist()
    cells = as_text(values)
    return [int(cell) for cell in cells] if all(WHOLE.fullmatch(cell) for cell in cells) else cells
