"""Conv4-64 on 28x28 images, 5-way 1-shot, 15 queries a class, 8 tasks, second-order MAML: time and memory a step."""

from harness import Worker, interleave, options, peer_workers, ratios, show, write

PEERS = ["torch.func loop", "torch.func vmap", "torch.compile", "torchopt", "higher", "learn2learn"]


def main() -> None:
    chosen = options(__doc__, threads={"type": int, "nargs": "+", "default": [2], "help": "of the peers"})
    rounds, seconds = (1, 0.1) if chosen.quick else (5, 1.0)
    start = {"metaprior": lambda: Worker("ours.py", "conv4", 1, 1, peer=False)}
    peers = PEERS[:1] if chosen.quick else PEERS
    figures = interleave(start | peer_workers(peers, "conv4", 1, chosen.threads), rounds, seconds)
    show("Conv4-64, 5-way 1-shot, 8 tasks, 1 inner step, second order", figures)
    times = ratios(figures, {"fastest peer": PEERS} | {peer: [peer] for peer in PEERS})
    write(chosen.json, {"workers": figures, "times_faster_than": times})


if __name__ == "__main__":
    main()
