"""Curvature of the summed support nll at phi: Gauss-Newton (Fisher), so never indefinite, beside a diagonal prior.

Each choice is `choice(outputs, likelihood, phi, batch, scale, key=None) -> Curvature` (see `rows.Curvature`):
"dual" is exact, "kfac" Kronecker-factored, "diagonal" and "lanczos" what they say.
"""

from metaprior.inference.curvature.diagonal import diagonal
from metaprior.inference.curvature.dual import dual
from metaprior.inference.curvature.rows import Curvature, as_scale, output_variance
from metaprior.inference.curvature.spectral import SpectralGaussian, descent_spectrum, laplace_spectrum

CURVATURES = {"dual": dual, "diagonal": diagonal}

__all__ = [
    "CURVATURES",
    "Curvature",
    "SpectralGaussian",
    "as_scale",
    "descent_spectrum",
    "diagonal",
    "dual",
    "laplace_spectrum",
    "output_variance",
]
