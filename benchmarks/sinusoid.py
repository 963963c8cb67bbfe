"""Sinusoid regression, MLP 1-40-40-1, 25 tasks of 10 + 10 points, second-order MAML: meta-steps a second."""

from harness import interleave, options, our_workers, peer_workers, ratios, show, write

LIBRARIES = ["learn2learn", "higher", "torchopt"]
PEERS = ["torch.compile", "torch.func vmap", "torch loop", *LIBRARIES]


def main() -> None:
    threads = {"type": int, "nargs": "+", "default": [1, 2], "help": "of each contender, its best counts"}
    chosen = options(__doc__, threads=threads)
    rounds, seconds = (1, 0.5) if chosen.quick else (5, 0.7)
    if chosen.quick:
        del chosen.threads[1:]
    result = {}
    for steps in (1,) if chosen.quick else (1, 5):
        start = our_workers("sinusoid", steps, 200, chosen.threads)
        start |= peer_workers(PEERS, "sinusoid", steps, chosen.threads)
        figures = interleave(start, rounds, seconds)
        show(f"sinusoid, {steps} inner step(s)", figures)
        times = ratios(figures, {"libraries": LIBRARIES} | {peer: [peer] for peer in PEERS})
        result[f"inner_steps_{steps}"] = {"workers": figures, "times_faster_than": times}
    write(chosen.json, result)


if __name__ == "__main__":
    main()
