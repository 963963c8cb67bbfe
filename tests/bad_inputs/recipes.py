"""Recipes and the command line: broken TOML, wrong sections, unknown names, wrong --set."""

from functools import partial
from pathlib import Path
from typing import Any

from bad_inputs.judging import Case, cli
from metaprior.experiments.recipe import build, load_recipe, recipe_from_dict

GOOD = """description = "x"
learner = "maml"

[tasks]
name = "sinusoid"
shot = 3

[network]
name = "mlp"
hidden = [4]

[likelihood]
name = "gaussian"

[learners.maml]
steps = 1
rate = 0.01

[training]
steps = 2

[evaluation]
tasks = 3
"""
# (what is replaced, by what, what the error must say)
TOML = [
    ("steps = 2", "steps = ", ("bad.toml", "line 20")),
    ("steps = 2", "steps = 2.5", ("bad.toml", "training.steps", "2.5", "line")),
    ("steps = 2", "steps = 'two'", ("bad.toml", "training.steps", "two")),
    ("steps = 2", "stepz = 2", ("bad.toml", "line 20", "stepz", "did you mean 'steps'")),
    ("steps = 2", "steps = 2\nsteps = 3", ("bad.toml",)),
    ("steps = 2", "optimizer = 'adamm'", ("bad.toml", "training.optimizer")),
    ("steps = 2", "schedule = 'cosin'", ("bad.toml", "training.schedule", "did you mean 'cosine'")),
    ("steps = 2", "meta_batch = 25\ntask_chunk = 7", ("task_chunk", "7")),
    ("[training]\nsteps = 2", "training = 3", ("bad.toml",)),
    ("[training]", "[trainin]", ("bad.toml", "trainin", "did you mean 'training'")),
    ("[training]", "[[training]]", ("bad.toml", "training", "table")),
    ('[network]\nname = "mlp"\nhidden = [4]', "", ("bad.toml", "network.name", "missing")),
    ('[tasks]\nname = "sinusoid"\nshot = 3', "", ("bad.toml", "tasks.name", "missing")),
    ('[likelihood]\nname = "gaussian"', "", ("bad.toml", "likelihood.name", "missing")),
    ('name = "sinusoid"', "", ("bad.toml", "tasks.name", "missing")),
    ('name = "sinusoid"', "name = 3", ("bad.toml", "tasks.name", "3")),
    ('name = "sinusoid"', 'name = "sinusoit"', ("bad.toml", "line 5", "did you mean 'sinusoid'")),
    ('name = "mlp"', 'name = "mpl"', ("bad.toml", "network.name", "did you mean 'mlp'")),
    ('name = "mlp"', 'name = ["mlp"]', ("bad.toml", "network.name")),
    ('name = "gaussian"', 'name = "gausian"', ("bad.toml", "did you mean 'gaussian'")),
    ('name = "gaussian"', 'name = "gaussian"\nscale = -1', ("bad.toml", "likelihood.scale", "-1")),
    ('name = "gaussian"', 'name = "gaussian"\nscale = nan', ("bad.toml", "likelihood.scale", "nan")),
    ("hidden = [4]", "hidden = 4", ("bad.toml", "network.hidden", "4")),
    ("hidden = [4]", "hidden = [4, 0]", ("bad.toml", "network.hidden")),
    ("hidden = [4]", "hidden = [4, 'a']", ("bad.toml", "network.hidden")),
    ("hidden = [4]", "hidden = '4'", ("bad.toml", "network.hidden")),
    ("shot = 3", "shot = 0", ("bad.toml", "line 6", "tasks.shot", "0")),
    ("shot = 3", "shots = 3", ("bad.toml", "tasks.shots", "did you mean 'shot'")),
    ("shot = 3", "amplitude = [5, 1]", ("bad.toml", "tasks.amplitude", "low <= high")),
    ("shot = 3", "amplitude = [1]", ("bad.toml", "tasks.amplitude")),
    ("shot = 3", "amplitude = 1", ("bad.toml", "tasks.amplitude")),
    ("shot = 3", "labelled = 2.0", ("labelled", "2")),
    ('learner = "maml"', 'learner = "mamll"', ("bad.toml", "did you mean 'maml'")),
    ('learner = "maml"', "learner = 3", ("bad.toml", "learner", "3")),
    ("rate = 0.01", "rate = inf", ("bad.toml", "learner.rate", "inf")),
    ("rate = 0.01", "rat = 0.1", ("bad.toml", "learner.rat ", "did you mean 'rate'")),
    ("rate = 0.01", "posterior = {name = 'laplace', draws = 2.5}", ("learner.posterior.draws", "2.5")),
    ("rate = 0.01", "posterior = {name = 'laplac'}", ("learner.posterior", "did you mean 'laplace'")),
    ("rate = 0.01", "posterior = 3", ("learner.posterior", "3")),
    ("rate = 0.01", "posterior = {draws = 3}", ("learner.posterior.name", "missing")),
    ("[learners.maml]", "[learners.mamll]", ("bad.toml", "did you mean 'maml'")),
    ("[learners.maml]\nsteps = 1\nrate = 0.01", "[learners]\nmaml = 3", ("bad.toml", "maml", "table")),
    ("tasks = 3", "tasks = 0", ("bad.toml", "evaluation.tasks", "0")),
    ("tasks = 3", "tasks = 1.5", ("bad.toml", "evaluation.tasks", "1.5")),
    ("tasks = 3", "metrics = 'mse'", ("bad.toml", "evaluation.metrics")),
    ("tasks = 3", "course = 'no'", ("bad.toml", "evaluation.course", "no")),
    ('description = "x"', "description = 3", ("bad.toml", "description", "3")),
]
SET = [
    ("evaluation.tasks=0", ("evaluation.tasks", "0")),
    ("evaluation.steps=-1", ("evaluation.steps", "-1")),
    ("training.steps=abc", ("training.steps", "abc")),
    ("training.rate=1e999", ("training.rate", "inf")),
    ("training.seed=-1", ("training.seed", "-1")),
    ("training.clip_norm=0", ("training.clip_norm", "0")),
    ("training.float64=1", ("training.float64", "1")),
    ("training=3", ("TABLE.OPTION=VALUE",)),
    ("=3", ("TABLE.OPTION=VALUE",)),
    ("steps", ("TABLE.OPTION=VALUE",)),
    ("learner.steps=2.5", ("learner.steps", "2.5")),
    ("learner.steps=[1,2]", ("learner.steps",)),
    ("learner.first_order=yes", ("learner.first_order", "yes")),
    ("learner.optimizer=adamm", ("learner.optimizer", "adamm")),
    ("learner.posterior=laplac", ("learner.posterior", "did you mean 'laplace'")),
    ("network.outputs=0", ("network.outputs", "0")),
    ("network.activation=rellu", ("activation", "rellu")),
    ("network.name=3", ("network.name", "3")),
    ("likelihood.scale=0", ("likelihood.scale", "0")),
    ("tasks.noise=-1", ("tasks.noise", "-1")),
    ("tasks.shot=1e30", ("tasks.shot", "1e+30")),
    ("tasks.shot={a=1}", ("tasks.shot", "{'a': 1}")),
    ("tasks.maml=3", ("maml", "3")),
    ("tasks.mamll={shot=3}", ("tasks.mamll", "is not an option")),
    ("training.steps={a=1}", ("training.steps", "{'a': 1}")),
    ("training.steps=5\nrate=3", ("training.steps",)),
    ("training.steps=", ("training.steps", "''")),
    ("training.steps='5'", ("training.steps", "'5'")),
    ("training.steps=[5]", ("training.steps", "[5]")),
    ("training.steps==5", ("training.steps", "'=5'")),
    ("training.steps =5", ("training.steps ",)),
    ("training.float64=True", ("training.float64", "'True'")),
    ("network.hidden=8,8", ("network.hidden", "'8,8'")),
    ("Training.steps=5", ("Training.steps", "did you mean 'training'")),
    ("=5", ("--set",)),
    ("augmentation.crop=-1", ("crop", "-1")),
    ("clusters.clusters=0", ("clusters.clusters", "0")),
    ("clusters.embeding=pixels", ("clusters.embeding", "embedding")),
    ("clusters.partition=kmedian", ("clusters.partition", "kmedian")),
    ("tasks.domain=[1,nan]", ("tasks.domain",)),
]
ARGUMENTS = [
    (("train", "sinusoid", "--steps", "2.5"), ("steps", "2.5")),
    (("train", "sinusoid", "--steps", "-1"), ("training.steps", "-1")),
    (("train", "sinusoid", "--seed", "x"), ("seed", "x")),
    (("train", "sinusoid", "--steps", "5", "--set", "training.steps=6"), ("--steps", "training.steps=6", "got 5")),
    (("train", "sinusoid", "--seed", "5", "--set", "training.seed=6"), ("--seed", "training.seed=6", "got 5")),
    (("train", "sinusoid", "--threads", "0"), ("threads", "0")),
    (("train", "sinusoid", "--devices", "0"), ("devices", "0")),
    (("train", "sinusoid", "--learner", ""), ("learner",)),
    (("train", "sinusoid", "--set", "clusters.partitions=2"), ("clusters need a pool of images",)),
    (("study", "clusters", "sinusoid"), ("must have [clusters]", "sinusoid")),
    (("train", "sinusoidd"), ("did you mean 'sinusoid'",)),
    (("train", "nowhere.toml"), ("nowhere.toml",)),
    (("train", ".toml"), (".toml",)),
    (("evaluate", "nowhere"), ("nowhere",)),
    (("evaluate", "nowhere", "--tasks", "0"), ("nowhere",)),
    (("plot", "nowhere"), ("nowhere",)),
    (("compare", "nowhere"), ("nowhere",)),
    (("adapt", "nowhere", "--support", "a.csv", "--query", "b.csv"), ("nowhere",)),
    (("no-such-command",), ("no-such-command",)),
]


def write(text: str, folder: Path) -> Path:
    path = folder / "bad.toml"
    path.write_text(text)
    return path


def folder_as_recipe(folder: Path) -> Any:
    (folder / "bad.toml").mkdir()
    return load_recipe(str(folder / "bad.toml"))


def cases() -> list[Case]:
    def toml(old: str, new: str, folder: Path) -> Any:
        assert old in GOOD
        return build(load_recipe(str(write(GOOD.replace(old, new, 1), folder))))

    def override(pair: str, folder: Path) -> Any:
        return cli("train", write(GOOD, folder), "--out", folder / "run", "--set", pair)

    def written(raw: bytes, folder: Path) -> Any:
        (folder / "bad.toml").write_bytes(raw)
        return load_recipe(str(folder / "bad.toml"))

    found = [Case(f"toml {old!r} as {new!r}", partial(toml, old, new), says) for old, new, says in TOML]
    found += [Case(f"--set {pair}", partial(override, pair), says) for pair, says in SET]
    found += [Case(" ".join(args), partial(lambda args, _: cli(*args), args), says) for args, says in ARGUMENTS]
    raws = {"binary": b"\xff\xfe\x00", "empty": b"", "null": b"\0\0", "a list": b"[1, 2]",
            "latin": b"description = '\xe9'"}  # fmt: skip
    found += [Case(f"toml {name}", partial(written, raw), ("bad.toml",)) for name, raw in raws.items()]
    found += [
        Case("toml with a byte order mark", partial(written, b"\xef\xbb\xbf" + GOOD.encode()),
             right=lambda r: r.learner == "maml"),
        Case("toml with 1e1", partial(toml, "steps = 2", "steps = 1e1"), right=lambda e: e.training.steps == 10),
        Case("toml with an integer rate", partial(toml, "rate = 0.01", "rate = 1"),
             right=lambda e: e.learner.path is not None),
        Case("toml with a posterior", partial(toml, "rate = 0.01", "posterior = {name = 'laplace', draws = 2}"),
             right=lambda e: e.learner.path is not None),
        Case("toml is a folder", folder_as_recipe, (".toml",)),
    ]  # fmt: skip
    broken = {"recipe.name": {"name": 3}, "recipe.tasks": {"name": "a", "tasks": 3}, "recipe.x": {"name": "a", "x": 1},
              "learners.maml": {"name": "a", "learners": {"maml": []}}, "recipe": [1]}  # fmt: skip
    found += [
        Case(f"recipe_from_dict {table}", partial(lambda table, _: recipe_from_dict(table), table), (says,))
        for says, table in broken.items()
    ]
    return found
