"""Curvature of the summed support nll at phi, together with a diagonal prior.

The curvature is the Gauss-Newton (Fisher) matrix, so it is never indefinite. Each choice is a function
`choice(outputs, likelihood, phi, batch, scale, key=None) -> Curvature` (see `rows.Curvature`): "dual" is exact, "kfac"
is Kronecker-factored, "diagonal" is the diagonal, and "lanczos" is matrix-free by the Lanczos process.
"""

from metaprior.inference.curvature.diagonal import diagonal
from metaprior.inference.curvature.dual import Dual, dual
from metaprior.inference.curvature.kfac import kfac
from metaprior.inference.curvature.lanczos import Lanczos, lanczos
from metaprior.inference.curvature.primal import Primal, by_size, primal
from metaprior.inference.curvature.rows import Curvature, as_scale, output_variance
from metaprior.inference.curvature.spectral import SpectralGaussian, descent_spectrum, laplace_spectrum

CURVATURES = {"dual": dual, "kfac": kfac, "diagonal": diagonal, "lanczos": lanczos}

__all__ = [
    "CURVATURES",
    "Curvature",
    "Dual",
    "Lanczos",
    "Primal",
    "SpectralGaussian",
    "as_scale",
    "by_size",
    "descent_spectrum",
    "diagonal",
    "dual",
    "kfac",
    "lanczos",
    "laplace_spectrum",
    "output_variance",
    "primal",
]
