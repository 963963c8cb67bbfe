"""Compile time of each recipe's training chunk: cold, and again from the persistent cache; each in a fresh process."""

import json
import subprocess
import sys
import tempfile
import time

from harness import HERE, environment, options, write


def measure(name: str) -> dict[str, float]:
    import jax

    from metaprior.core.runtime import configure
    from metaprior.experiments.recipe import build, load_recipe
    from metaprior.training.loop import init_state, run_chunk

    configure()
    made = build(load_recipe(name))
    state = jax.eval_shape(lambda: init_state(made.learner, made.splits.train, made.training))
    chunk = run_chunk(made.learner, made.training)
    began = time.perf_counter()
    lowered = chunk.lower(state, made.splits.train, made.training.chunk)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace_seconds": traced - began, "compile_seconds": time.perf_counter() - traced}


def main() -> None:
    chosen = options(__doc__, one={"help": "RECIPE: this process measures one figure"})
    if chosen.one:
        print(json.dumps(measure(chosen.one)))
        return
    from metaprior.experiments.recipe import recipe_names

    result = {}
    for name in ["sinusoid"] if chosen.quick else recipe_names():
        with tempfile.TemporaryDirectory() as cache:
            result[name] = {}
            for when in ("cold", "cached"):
                command = [sys.executable, str(HERE / "compile_time.py"), "--one", name]
                settings = environment() | {"JAX_COMPILATION_CACHE_DIR": cache}
                ended = subprocess.run(command, env=settings, capture_output=True, text=True)
                if ended.returncode:
                    said = ended.stderr.strip().splitlines()
                    result[name] = {"failed": said[-1][:300] if said else "no word"}
                    break
                result[name][when] = json.loads(ended.stdout.splitlines()[-1])
        print(name, result[name], flush=True)
    write(chosen.json, result)


if __name__ == "__main__":
    main()
