"""Networks, each a `Model` of pure functions, and adapters for Flax and Equinox modules."""

from metaprior.core.named import Registry
from metaprior.networks.adapters import from_equinox, from_flax, known_noise
from metaprior.networks.bag import bag
from metaprior.networks.conv4 import conv4, conv6
from metaprior.networks.linear import linear
from metaprior.networks.mlp import mlp
from metaprior.networks.resnet12 import resnet12
from metaprior.networks.token_lstm import token_lstm
from metaprior.networks.twin import twin

NETWORKS = Registry("network", {
    "linear": linear, "mlp": mlp, "conv4": conv4, "conv6": conv6, "resnet12": resnet12,
    "twin": twin, "bag": bag, "token_lstm": token_lstm,
})  # fmt: skip

__all__ = [
    "NETWORKS",
    "bag",
    "conv4",
    "conv6",
    "from_equinox",
    "from_flax",
    "known_noise",
    "linear",
    "mlp",
    "resnet12",
    "token_lstm",
    "twin",
]
