"""Omniglot's official one-shot runs, for runs that were trained on other characters."""

from metaprior.experiments.recipe import Recipe, most_ways, own_table
from metaprior.tasks import FixedTasks, one_shot_source


def one_shot_runs_for(recipe: Recipe) -> FixedTasks:
    """Returns Omniglot's official 20 runs, with the image size of a recipe.

    Args:
        recipe: The recipe of a trained run.

    Raises:
        ValueError: The run was trained on some of their characters, or with fewer than 20 classes.
    """
    tasks = own_table(recipe.tasks, recipe.learner)
    if tasks.get("name") != "omniglot" or tasks.get("split") != "lake":
        raise ValueError(
            "--split one_shot: the run must be trained on Omniglot's split 'lake', which leaves out the characters of "
            f"these tasks, got {tasks.get('name')} with split {tasks.get('split')!r}. Train with "
            "--set tasks.split=lake."
        )
    if (way := most_ways(recipe) or 0) < 20:
        raise ValueError(
            f"--split one_shot: the run must be trained with at least 20 classes per task, got {way}. Train with "
            "--set tasks.way=20 (or tasks.train_way=20)."
        )
    return one_shot_source(size=tasks.get("size", 28), moments=tasks.get("moments", False))
