"""A learned optimiser (Andrychowicz et al. 2016) on 10-d quadratics: meta-steps a second against eager torch.

A meta-step is one optimisation of 100 steps, back-propagated through unrolls of 20, and one step of Adam.
"""

from harness import Worker, against, interleave, options, peer_workers, show, write

PEERS = ["torch eager"]


def main() -> None:
    extra = {"threads": {"type": int, "nargs": "+", "default": [1, 2], "help": "of the peers"}}
    extra["functions"] = {"type": int, "nargs": "+", "default": [1, 16, 128], "help": "optimised at once"}
    chosen = options(__doc__, **extra)
    rounds, seconds = (1, 0.3) if chosen.quick else (5, 1.0)
    if chosen.quick:
        del chosen.threads[1:], chosen.functions[1:]
    result = {}
    for functions in chosen.functions:
        name, at_once = f"quadratics-{functions}", max(64 // functions, 1)
        start = {"metaprior": lambda name=name, n=at_once: Worker("ours.py", name, 100, n, peer=False)}
        figures = interleave(start | peer_workers(PEERS, name, 100, chosen.threads), rounds, seconds)
        ratio = against(figures, "metaprior", PEERS)
        show(f"learned optimiser, {functions} function(s) a meta-step", figures)
        print("  times torch eager: " + ("-" if ratio is None else f"{ratio:.1f}"))
        result[name] = {"workers": figures, "times_faster_than": ratio}
    write(chosen.json, result)


if __name__ == "__main__":
    main()
