"""Networks, each a `Model` of pure functions, and adapters for those of Flax and Equinox."""

from collections.abc import Callable

from metaprior.networks.adapters import from_equinox, from_flax
from metaprior.networks.conv4 import conv4, conv6
from metaprior.networks.linear import linear
from metaprior.networks.mlp import mlp
from metaprior.networks.resnet12 import resnet12
from metaprior.types import Model

NETWORKS: dict[str, Callable[..., Model]] = {
    "linear": linear, "mlp": mlp, "conv4": conv4, "conv6": conv6, "resnet12": resnet12
}  # fmt: skip

__all__ = ["NETWORKS", "conv4", "conv6", "from_equinox", "from_flax", "linear", "mlp", "resnet12"]
