"""CSV tables: headers, numbers, ids, groups, targets."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bad_inputs.judging import Case
from metaprior.tasks import table

KEY = jax.random.key(0)


def rows(groups: int = 10, each: int = 6, **change: Any) -> str:
    """A table with columns g, a, y; change: other text for one column of row 7."""
    lines = ["g,a,y"]
    for i in range(groups * each):
        cells = {"g": f"g{i // each}", "a": f"{i % each}", "y": f"{i * 0.5}"} | (change if i == 7 else {})
        lines.append(",".join(str(c) for c in cells.values()))
    return "\n".join(lines) + "\n"


# name: (text or bytes, the error's words, other options)
BAD: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "empty": ("", ("t.csv",), {}),
    "header alone": ("g,a,y\n", ("t.csv",), {}),
    "one row": ("g,a,y\nb,1,2\n", ("group",), {}),
    "word in a number": (rows(a="oops"), ("oops", "a"), {}),
    "decimal comma": (rows(a='"3,14"'), ("3,14", "a"), {}),
    "missing": (rows(a=""), ("a", "row"), {}),
    "nan": (rows(a="nan"), ("a",), {}),
    "inf": (rows(a="inf"), ("a",), {}),
    "1e308": (rows(a="1e308"), ("a", "1e"), {}),
    "1e400": (rows(a="1e400"), ("a",), {}),
    "underscore": (rows(a="1_0"), ("a", "1_0"), {}),
    "hex": (rows(a="0x10"), ("a", "0x10"), {}),
    "target missing": (rows(y=""), ("y", "row"), {}),
    "target nan": (rows(y="nan"), ("y",), {}),
    "target 1e308": (rows(y="1e308"), ("y", "1e"), {}),
    "target a word": (rows(y="oops"), ("y", "oops"), {"classification": False}),
    "group NA": (rows(g="NA"), ("g", "row"), {}),
    "group missing": (rows(g=""), ("g", "row"), {}),
    "duplicate column": (rows().replace("g,a,y", "g,a,a"), ("'a'", "2 times"), {"target": "a"}),
    "nameless column": (rows().replace("g,a,y", "g,,y"), ("column",), {}),
    "short line": (rows() + "g1,2\n", ("line", "2"), {}),
    "long line": (rows() + "g1,2,3,4\n", ("line", "4"), {}),
    "binary": (b"\xff\xfe\0\1\2", ("t.csv",), {}),
    "unknown target": (rows(), ("target", "yy", "did you mean 'y'"), {"target": "yy"}),
    "unknown group": (rows(), ("group", "gg"), {"group": "gg"}),
    "unknown feature": (rows(), ("features", "aa"), {"features": ["aa"]}),
    "no feature": (rows(), ("features",), {"features": []}),
    "target as feature": (rows(), ("features", "y"), {"features": ["a", "y"]}),
    "group as target": (rows(), ("target", "group"), {"target": "g"}),
    "split of two": (rows(), ("split",), {"split": [0.5, 0.5]}),
    "split above 1": (rows(), ("split",), {"split": [0.5, 0.5, 0.5]}),
    "split below 0": (rows(), ("split",), {"split": [1.5, -0.25, -0.25]}),
    "split a word": (rows(), ("split",), {"split": "half"}),
    "split a number": (rows(), ("split",), {"split": 0.5}),
    "split unknown group": (rows(), ("split", "zz"), {"split": [["g0"], ["g1"], ["zz"]]}),
    "split twice": (rows(), ("split", "g0"), {"split": [["g0"], ["g0"], ["g1"]]}),
    "one group": (rows(1), ("group",), {}),
    "groups of one row": (rows(10, 1), ("row",), {}),
    "shot a float": (rows(), ("shot", "2.5"), {"shot": 2.5}),
    "standardise a word": (rows(), ("standardise", "yes"), {"standardise": "yes"}),
}


def cases() -> list[Case]:
    def given(text: Any, options: dict[str, Any], folder: Path) -> Any:
        path = folder / "t.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return table(path, **{"target": "y", "group": "g"} | options)

    def ids(names: list[str], folder: Path) -> int:
        text = "g,a,y\n" + "".join(f"{n},{i},{i}\n" for n in names for i in range(4))
        splits = given(text, {"shot": 1, "query": 1}, folder)
        return sum(len(source.starts) for source in splits)

    found = [Case(f"table {name}", partial(given, text, options), says) for name, (text, says, options) in BAD.items()]
    apart = {
        "ids of 64 bits": [str(9007199254740990 + i) for i in range(8)],
        "leading zeros": ["7", "07", "007", "0007", "8", "08", "9", "09"],
        "as numbers alike": ["1e1", "10", "1_0", "10.0", "+10", "0xA", "11", "12"],
        "case matters": ["a", "A", "b", "B", "c", "C", "d", "D"],
    }
    found += [Case(f"table {name}", partial(ids, names), right=lambda n: n == 8) for name, names in apart.items()]
    forms = {
        "crlf": rows().replace("\n", "\r\n"),
        "byte order mark": "\ufeff" + rows(),
        "quoted": rows().replace("g,a,y", '"g","a","y"'),
        "no last newline": rows().rstrip("\n"),
        "constant column": "\n".join(
            ["g,a,y", *(f"g{i // 6},0.1,{i}" for i in range(60))]) + "\n",
        "large offset": "\n".join(["g,a,y", *(f"g{i // 6},{1.7e9 + i},{i}" for i in range(60))]) + "\n",
    }  # fmt: skip

    def sampled(text: str, folder: Path) -> Any:
        return given(text, {"shot": 2, "query": 2}, folder).train.sample(KEY, 2)

    def right(task: Any) -> bool:
        finite = all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(task))
        return task.support.x.shape == (2, 2, 1) and finite

    return found + [Case(f"table {name}", partial(sampled, text), right=right) for name, text in forms.items()]
