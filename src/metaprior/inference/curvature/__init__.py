"""Curvature of the summed support nll at phi: Gauss-Newton (Fisher), so never indefinite, beside a diagonal prior.

Each choice is `choice(outputs, likelihood, phi, batch, scale, key=None) -> Curvature` (see `rows.Curvature`):
"dual" is exact, "kfac" Kronecker-factored, "diagonal" and "lanczos" what they say.
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
