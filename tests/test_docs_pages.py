"""The pages of docs/: their table of inner-loop defaults, their Python blocks and their links within the site."""

import inspect
import json
import re
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import metaprior as mp
from metaprior.inference.inner_loop import InnerLoop

DOCS = Path(__file__).parent.parent / "docs"


def table_after(page: str, heading: str, first: str) -> list[list[str]]:
    """The cells of the table below a heading whose first column has the name `first`."""
    part = (DOCS / page).read_text().split(f"## {heading}\n")[1]
    rows = part.split(f"| {first} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_inner_loops_defaults_are_those_of_the_learners():
    standard = {field.name: field.default for field in fields(InnerLoop)}
    seen = set()
    for learners, others, without in table_after("learners.md", "Which options does the inner loop have?", "learners"):
        values = {n: json.loads(v.strip("`")) for n, v in re.findall(r'`(\w+)` (`"\w+"`|[\d.]+|true|false)', others)}
        left_out = set(re.findall(r"`(\w+)`", without))
        expected = {n: v for n, v in (standard | values).items() if n not in left_out}
        for name in re.findall(r"`(\w+)`", learners):
            options = inspect.signature(mp.LEARNERS[name]).parameters
            assert {n: options[n].default for n in standard if n in options} == expected, name
            seen.add(name)
    assert seen == {n for n, factory in mp.LEARNERS.items() if "steps" in inspect.signature(factory).parameters}


@partial(jax.jit, static_argnums=0)
def log_prob(learner: mp.Learner, task: mp.Task) -> jax.Array:
    """The queries' log probabilities, before any training."""
    key = jax.random.key(0)
    params = learner.init(key, task)
    return learner.predict(params, learner.adapt(params, task.support, key), task.query.x, key).log_prob(task.query.y)


@pytest.mark.slow
def test_the_docs_networks_run():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "networks.md").read_text(), re.DOTALL)
    blocks = [block for block in blocks if "splits" not in block]
    assert len(blocks) == 5
    names: dict = {}
    x = jnp.linspace(-1, 1, 5)[:, None]
    task = mp.Task(mp.Batch(x, x), mp.Batch(x, x))
    for block in blocks:
        exec(compile(block, "docs/networks.md", "exec"), names)
        assert jnp.isfinite(log_prob(names["learner"], task)).all()


def anchors(page: Path) -> set[str]:
    """The anchors that mkdocs makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.*)$", text, re.M))
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def documented(page: Path, name: str) -> bool:
    """Whether mkdocstrings makes this anchor on a page: a name of a module that the page documents."""
    modules = re.findall(r"^::: (\S+)", page.read_text(), re.M)
    module, _, function = name.rpartition(".")
    return any(module == m or module.startswith(f"{m}.") for m in modules) and hasattr(import_module(module), function)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_links_within_the_docs_lead_somewhere(page):
    for place, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
        goal = page if not place else (page.parent / place)
        assert goal.exists(), place
        assert not anchor or anchor in anchors(goal) or documented(goal, anchor), f"{place}#{anchor}"
