"""What posteriors cost: particles against one, 100 draws against one, Laplace against laplace-torch."""

from harness import Worker, against, interleave, options, show, write


def ours(what: str):
    return lambda: Worker("bayes_ours.py", what, peer=False)


def main() -> None:
    chosen = options(__doc__)
    rounds, seconds, first = (1, 0.1, 1) if chosen.quick else (5, 2.0, None)  # quick: the first of each kind
    particles = interleave({n: ours(n) for n in ("maml", "bmaml-1", "bmaml-5", "chaser-5")[:first]}, rounds, seconds)
    show("a meta-step on 25 sinusoids, one inner step", particles)
    names = [f"{kind}-{number}" for kind in ("variational", "laplace") for number in (1, 100)]
    draws = interleave({n: ours(n) for n in names[:first]}, rounds, seconds)
    show("600 sinusoid tasks adapted and predicted with so many draws", draws)
    peers = {f"laplace-torch {s}": lambda s=s: Worker("laplace_torch.py", s, peer=True) for s in ("full", "kron")}
    around = interleave({n: ours(n) for n in ("head", "all")[:first]} | peers, rounds, seconds)
    show("Laplace on Conv4-64 at 28x28, 5 images, 75 queries", around)
    found = {
        "5_particles_over_maml": against(particles, "maml", ["bmaml-5"]),
        "5_particles_and_chaser_over_maml": against(particles, "maml", ["chaser-5"]),
        "100_variational_draws_over_1": against(draws, "variational-1", ["variational-100"]),
        "100_laplace_draws_over_1": against(draws, "laplace-1", ["laplace-100"]),
        "head_faster_than_laplace_torch": against(around, "head", list(peers)),
    }
    for name, ratio in found.items():
        print(f"  {name}: " + ("-" if ratio is None else f"{ratio:.2f}"))
    write(chosen.json, {"particles": particles, "draws": draws, "laplace": around, "ratios": found})


if __name__ == "__main__":
    main()
