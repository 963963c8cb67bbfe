"""laplace-torch on one task: Laplace of a Conv4's last layer, fitted to 5 images, asked about 75.

Usage: laplace_torch.py STRUCTURE (of the Hessian: full or kron; see worker.py).
"""

import sys
from collections.abc import Callable

import torch
from laplace import Laplace
from torch.utils.data import DataLoader, TensorDataset

from problems_torch import conv4, images
from worker import serve


def build(structure: str) -> Callable[[], int]:
    torch.manual_seed(0)
    support, labels, query, _ = (part[0] for part in images(1))
    model = conv4().eval()
    loader = DataLoader(TensorDataset(support, labels), batch_size=len(labels))

    def run() -> int:
        fitted = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure=structure)
        fitted.fit(loader)
        fitted(query, link_approx="probit")
        return 1

    return run


if __name__ == "__main__":
    serve(lambda: build(sys.argv[1]))
