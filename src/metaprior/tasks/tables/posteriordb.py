"""Data and reference draws of Stan's posterior database: eight schools, and radon in 386 counties.

They are read from METAPRIOR_DATA/posteriordb.

References:
    Magnusson et al., posteriordb.

    Rubin 1981, for eight schools.

    Gelman & Hill 2007, for radon.
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
    """Reads the JSON of NAME.json.zip in the folder METAPRIOR_DATA/posteriordb.

    Args:
        name: NAME.

    Returns:
        The parsed JSON.

    Raises:
        DataError: No such file, or a damaged one.
    """
    folder = data_folder("posteriordb")
    if folder is None or not (folder / f"{name}.json.zip").is_file():
        raise DataError(f"{name}: no file {name}.json.zip. Put it into a folder posteriordb/ inside METAPRIOR_DATA.")
    path = folder / f"{name}.json.zip"
    with reading(path), open_zip(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def eight_schools() -> Batch:
    """Returns the effects of coaching in eight schools; each school is a task.

    They fit the network `known_noise(linear())`, whose one weight per task is the true effect of the school.

    Returns:
        x [8, 1, 2] holds (1, known standard deviation), y [8, 1, 1] the estimated effect.

    Raises:
        DataError: No such file, or a damaged one.
    """
    table = read_posteriordb("eight_schools")
    sd = jnp.asarray(table["sigma"], float)
    x = jnp.stack([jnp.ones_like(sd), sd], -1)[:, None]
    return Batch(x, jnp.asarray(table["y"], float)[:, None, None])


def eight_schools_reference() -> dict[str, np.ndarray]:
    """Returns the 10,000 reference draws of the posterior of eight schools.

    Returns:
        theta [draws, 8], mu [draws] and tau [draws], under the priors mu ~ N(0, 5^2) and tau ~ |Cauchy(0, 5)|.

    Raises:
        DataError: No such file, or a damaged one.
    """
    chains = read_posteriordb("eight_schools-eight_schools_noncentered")
    joined = {name: np.concatenate([chain[name] for chain in chains]) for name in chains[0]}
    theta = np.stack([joined[f"theta[{j + 1}]"] for j in range(8)], -1)
    return {"theta": theta, "mu": joined["mu"], "tau": joined["tau"]}


def radon_all_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the radon measurements of 386 counties, without houses whose floor is unknown.

    Returns:
        x [n, 2] (1 if above the basement, log uranium), y [n, 1] log radon, and the county [n].

    Raises:
        DataError: No such file, or a damaged one.
    """
    table = read_posteriordb("radon_all")
    floor = np.asarray(table["floor_measure"])
    known = floor != UNKNOWN_FLOOR
    x = np.stack([floor > 0, np.asarray(table["log_uppm"])], -1).astype(float)
    return x[known], np.asarray(table["log_radon"], float)[known, None], np.asarray(table["county_idx"])[known]


@passes_options_to(array_tasks)
def radon_all(*, standardise: bool = True, small: Literal["error", "drop"] = "drop", **options: Any) -> Splits:
    """Predicts log radon in the houses of 386 counties; each county is a task.

    Args:
        standardise: As in `array_tasks`.
        small: As in `array_tasks`.
        **options: Other options of `array_tasks`.

    Returns:
        Tasks of the training, validation and test counties.

    Raises:
        DataError: No such file, a damaged one, or an argument that `array_tasks` rejects.
    """
    x, y, county = radon_all_table()
    named: dict[str, Any] = {"columns": ("floor", "log_uranium"), "names": ("log_radon", "county")} | options
    return array_tasks(x, y, county, standardise=standardise, small=small, **named)
