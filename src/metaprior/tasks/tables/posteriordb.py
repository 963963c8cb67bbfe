"""Data and reference draws of Stan's posterior database: eight schools, and radon in 386 counties.

Read from METAPRIOR_DATA/posteriordb (Magnusson et al., posteriordb; Rubin 1981; Gelman & Hill 2007).
"""

import json
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from metaprior.core.named import passes_options_to
from metaprior.core.types import Batch, Splits
from metaprior.tasks.checks import DataError
from metaprior.tasks.limits import open_zip
from metaprior.tasks.store import data_folder, reading
from metaprior.tasks.tables.arrays import array_tasks

UNKNOWN_FLOOR = 9


def read_posteriordb(name: str) -> Any:
    """The JSON of NAME.json.zip.

    Raises:
        DataError: no such file in a folder posteriordb/ inside the one that METAPRIOR_DATA names, or a damaged one.
    """
    folder = data_folder("posteriordb")
    if folder is None or not (folder / f"{name}.json.zip").is_file():
        raise DataError(f"{name}: needs {name}.json.zip in a folder posteriordb/ inside the one METAPRIOR_DATA names")
    path = folder / f"{name}.json.zip"
    with reading(path), open_zip(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def eight_schools() -> Batch:
    """Effects of coaching in eight schools: x [8, 1, 2] is (1, known sd), y [8, 1, 1] the estimate; a school a task.

    For `known_noise(linear())`, whose one weight a task is the school's true effect.
    """
    table = read_posteriordb("eight_schools")
    sd = jnp.asarray(table["sigma"], float)
    x = jnp.stack([jnp.ones_like(sd), sd], -1)[:, None]
    return Batch(x, jnp.asarray(table["y"], float)[:, None, None])


def eight_schools_reference() -> dict[str, np.ndarray]:
    """The 10,000 reference draws: theta [draws, 8], mu and tau [draws], under mu ~ N(0, 5^2), tau ~ |Cauchy(0, 5)|."""
    chains = read_posteriordb("eight_schools-eight_schools_noncentered")
    joined = {name: np.concatenate([chain[name] for chain in chains]) for name in chains[0]}
    theta = np.stack([joined[f"theta[{j + 1}]"] for j in range(8)], -1)
    return {"theta": theta, "mu": joined["mu"], "tau": joined["tau"]}


def radon_all_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [n, 2] (above the basement, log uranium), y [n, 1] log radon, county [n]; unknown floors are left out."""
    table = read_posteriordb("radon_all")
    floor = np.asarray(table["floor_measure"])
    known = floor != UNKNOWN_FLOOR
    x = np.stack([floor > 0, np.asarray(table["log_uppm"])], -1).astype(float)
    return x[known], np.asarray(table["log_radon"], float)[known, None], np.asarray(table["county_idx"])[known]


@passes_options_to(array_tasks)
def radon_all(*, standardise: bool = True, small: Literal["error", "drop"] = "drop", **options: Any) -> Splits:
    """Log radon in the houses of 386 counties; options of `array_tasks`."""
    x, y, county = radon_all_table()
    named: dict[str, Any] = {"columns": ("floor", "log_uranium"), "names": ("log_radon", "county")} | options
    return array_tasks(x, y, county, standardise=standardise, small=small, **named)
