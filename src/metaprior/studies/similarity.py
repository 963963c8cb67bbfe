"""How similar are two representations of the same inputs? Canonical correlations and centred kernel alignment (CKA).

X [n, p] and Y [n, q] are the outputs of two layers at n inputs. With fewer than about ten rows per column, mean CCA
and plain CKA are near 1 also for unrelated layers: for independent noise of 25 rows and 64 columns, mean CCA is 1 and
CKA is about 0.74. The debiased CKA is about 0 there.

References:
    Kornblith, Norouzi, Lee & Hinton 2019, for CKA.

    Song, Smola, Gretton, Bedo & Borgwardt 2012, for the unbiased HSIC that the debiased CKA divides.

    Raghu, Gilmer, Yosinski & Sohl-Dickstein 2017, for SVCCA.
"""

import numpy as np
from jaxtyping import Float

ENOUGH = 10  # rows per column, for CCA
LEAST = 4  # rows, for the debiased CKA
RANK = 1e-6  # singular values below this share of the largest one are rounding errors of float32


def cka(x: Float[np.ndarray, "n p"], y: Float[np.ndarray, "n q"], *, debiased: bool = True) -> float:
    """Computes the linear CKA: the cosine between the centred Gram matrices of x and y.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), with K = X X' and L = Y Y'. With double-centred K and L it equals
    |Y'X|^2 / (|X'X| |Y'Y|) for centred columns. It is invariant to orthogonal maps and to isotropic scale, not to
    invertible maps.

    Args:
        x: Outputs of one layer.
        y: Outputs of another layer at the same inputs.
        debiased: Whether to use the unbiased HSIC, which is U-centred and has no diagonal. It is 0 on average for
            independent x and y and needs 4 rows.

    Returns:
        The similarity, at most 1. NaN if x or y is constant.

    Raises:
        ValueError: The rows differ in number or are too few.
    """
    x, y = _rows(x, y, LEAST if debiased else 2)
    centre = u_centred if debiased else double_centred
    k, m = (centre(a @ a.T) for a in (x - x.mean(0), y - y.mean(0)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def double_centred(k: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Returns H K H with H = I - 1 1' / n, a Gram matrix of centred columns."""
    return k - k.mean(0) - k.mean(1)[:, None] + k.mean()


def u_centred(k: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Returns the U-centred Gram matrix, with which sum(K * L) / (n (n - 3)) is the unbiased HSIC.

    References:
        Szekely & Rizzo 2014.
    """
    n = len(k)
    k = k - np.diag(np.diag(k))
    total = k.sum() / ((n - 1) * (n - 2))
    k = k - k.sum(0) / (n - 2) - k.sum(1)[:, None] / (n - 2) + total
    return k - np.diag(np.diag(k))


def canonical_correlations(x: Float[np.ndarray, "n p"], y: Float[np.ndarray, "n q"], keep: float = 1.0) -> np.ndarray:
    """Computes the canonical correlations of x and y, the singular values of Qx'Qy for orthonormal bases Qx and Qy.

    They are invariant to invertible maps.

    Args:
        x: Outputs of one layer.
        y: Outputs of another layer at the same inputs.
        keep: The share of the variance whose leading directions are used: 1 is CCA, 0.99 is SVCCA.

    Returns:
        The correlations [r] in descending order, with r the smaller rank of the two.

    Raises:
        ValueError: The rows differ in number or are too few.
    """
    x, y = _rows(x, y, 2)

    def basis(a: np.ndarray) -> np.ndarray:
        q, r = np.linalg.qr(a - a.mean(0))  # far faster than the singular vectors of many rows
        u, s, _ = np.linalg.svd(r, full_matrices=False)
        rank = int((s > RANK * s[0]).sum()) if s[0] > 0 else 0
        enough = int(np.searchsorted(np.cumsum(s**2), keep * (s**2).sum() * (1 - 1e-12)) + 1) if keep < 1 else rank
        return q @ u[:, : min(rank, enough)]

    return np.minimum(np.linalg.svd(basis(x).T @ basis(y), compute_uv=False), 1.0)


def cca(x: Float[np.ndarray, "n p"], y: Float[np.ndarray, "n q"], keep: float = 1.0) -> float:
    """Computes the mean canonical correlation. It is NaN if x or y is constant.

    Args:
        x: Outputs of one layer.
        y: Outputs of another layer at the same inputs.
        keep: As in `canonical_correlations`.
    """
    found = canonical_correlations(x, y, keep)
    return float(found.mean()) if found.size else float("nan")


def _rows(x: np.ndarray, y: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be [n, p] and [n, q] of the same n, got shapes {x.shape} and {y.shape}.")
    if len(x) < least:
        raise ValueError(f"x and y must have at least {least} rows, got {len(x)}.")
    return x, y
