"""Recipes with more ways in training than at test."""

import jax
import jax.numpy as jnp
import pytest

from metaprior.core.types import Batch, Splits, Task
from metaprior.experiments.recipe import build, load_recipe, most_ways, recipe_from_dict, training_of, with_overrides
from metaprior.tasks import FixedTasks


@pytest.mark.slow
def test_the_largest_way_reaches_the_network_and_the_learner():
    recipe = recipe_from_dict({
        "name": "ways", "learner": "protonet", "tasks": {"name": "omniglot", "way": 5, "train_way": 9},
        "network": {"name": "mlp", "hidden": [4]}, "likelihood": {"name": "categorical"},
    })  # fmt: skip
    assert most_ways(recipe) == 9
    batch = Batch(jnp.ones((5, 3)), jnp.arange(5))
    tasks = FixedTasks(jax.tree.map(lambda leaf: leaf[None], Task(batch, batch)))
    for learner in ("protonet", "nearest_neighbour", "maml"):
        made = build(with_overrides(recipe, learner), splits=Splits(tasks, tasks, tasks))
        params = made.learner.init(jax.random.key(0), Task(batch, batch))
        posterior = made.learner.adapt(params, batch, jax.random.key(0))
        assert made.learner.predict(params, posterior, batch.x, jax.random.key(0)).mean().shape == (5, 9)
    assert most_ways(with_overrides(recipe, None, {"tasks.way": 20})) == 20
    assert most_ways(recipe_from_dict({"name": "sines", "tasks": {"name": "sinusoid"}})) is None


def test_a_learner_has_tables_of_its_own_and_overrides_win():
    common = load_recipe("omniglot-5way-1shot")
    plain, reptile = with_overrides(common), with_overrides(common, "reptile")
    assert (plain.tasks["query"], reptile.tasks["query"]) == (1, 9)
    assert training_of(reptile).optimizer == "sgd"
    chosen = with_overrides(common, "reptile", {"training.rate": 0.25, "tasks.query": 4})
    assert (training_of(chosen).rate, chosen.tasks["query"]) == (0.25, 4)
