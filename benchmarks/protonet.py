"""Conv4-64 on 28x28 images, 60-way 1-shot, 5 queries a class, one task: time and memory a ProtoNet training step."""

from harness import Worker, interleave, options, peer_workers, ratios, show, write

PEERS = ["torch", "torch compiled"]


def main() -> None:
    chosen = options(__doc__, threads={"type": int, "nargs": "+", "default": [2], "help": "of the peers"})
    rounds, seconds = (1, 0.1) if chosen.quick else (5, 2.0)
    start = {"metaprior": lambda: Worker("ours.py", "protonet", 0, 1, peer=False)}
    peers = PEERS[:1] if chosen.quick else PEERS
    figures = interleave(start | peer_workers(peers, "protonet", 0, chosen.threads), rounds, seconds)
    show("ProtoNet, Conv4-64, 60-way 1-shot, 5 queries a class", figures)
    times = ratios(figures, {"fastest peer": PEERS} | {peer: [peer] for peer in PEERS})
    write(chosen.json, {"workers": figures, "times_faster_than": times})


if __name__ == "__main__":
    main()
