"""Networks, each a `Model` of pure functions, and adapters for those of Flax and Equinox."""

from collections.abc import Callable

from metaprior.networks.adapters import from_equinox, from_flax, known_noise
from metaprior.networks.conv4 import conv4
from metaprior.networks.linear import linear
from metaprior.networks.mlp import mlp
from metaprior.networks.twin import twin
from metaprior.types import Model

NETWORKS: dict[str, Callable[..., Model]] = {"linear": linear, "mlp": mlp, "conv4": conv4, "twin": twin}

__all__ = ["NETWORKS", "conv4", "from_equinox", "from_flax", "known_noise", "linear", "mlp", "twin"]
