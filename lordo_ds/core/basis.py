"""The basis: the leading left space of a matrix (pseudo-gradient or gradient), and its refresh."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A direction counts as significant while it stands out of the rounding noise by this factor.
_NOISE_FACTOR = 32.0
_FIRST_BASIS_ITERATIONS = 2


@dataclass(frozen=True)
class Refreshed:
    """A new basis, (s, r), orthonormal columns, and what a user should know about how it came to be.

    `note` is empty for an ordinary refresh. `kept` says that the previous basis was kept because the matrix
    was zero or not finite, or its decomposition failed.
    """

    basis: Tensor
    note: str = ""
    kept: bool = False


def refresh_basis(
    matrix: Tensor, previous: Tensor | None, rank: int, *, method: str, source: str, seed: int
) -> Refreshed:
    """Top-r left space of D (or of its part outside the previous basis), or the previous basis.

    `pseudo_gradient` and `gradient` take the leading left space of the matrix D itself, `complement` that of
    (I - Q Q^T) D. Where fewer than r directions are significant, those are taken and the rest filled up with
    the leading columns of the previous basis (without one: of the identity), orthogonalised.

    Args:
        matrix: D or the first gradient, (s, l), fp32 or fp64; not modified.
        previous: Q, (s, r) with orthonormal columns, or None for a first basis.
        rank: r <= s.
        method: "power" (one warm-started subspace iteration; two from a Gaussian sketch where there is
            nothing to start from), "eigh" (of D D^T in fp64) or "svd".
        source: "pseudo_gradient", "complement" or "gradient".
        seed: seeds the Gaussian sketch; equal on all ranks that hold the matrix.

    Returns:
        The new basis in the matrix's dtype. Equal inputs give equal outputs on equal hardware.
    """
    fallback = previous if previous is not None else _identity_columns(matrix, rank)
    if not bool(torch.isfinite(matrix).all()):
        return Refreshed(fallback, "its matrix is not finite", kept=True)
    complement = source == "complement" and previous is not None
    target = matrix
    if complement:
        assert previous is not None
        target = matrix - previous @ (previous.mT @ matrix)
    # Only relative sizes matter, and squares of small pseudo-gradients underflow in fp32.
    scale = matrix.abs().amax()
    if not bool(scale > 0) or not bool(target.abs().amax() > 0):
        return Refreshed(fallback, "its matrix is zero", kept=True)
    target = target / scale
    floor = _NOISE_FACTOR * torch.finfo(matrix.dtype).eps
    if complement:
        # What projection left over is rounding noise of the whole matrix, not of the remainder.
        floor *= max(1.0, float(torch.linalg.matrix_norm(matrix / scale) / torch.linalg.matrix_norm(target)))
    try:
        basis, note = _leading_left_space(target, previous, rank, method, complement, seed, floor)
    except torch.linalg.LinAlgError as error:
        return Refreshed(fallback, f"its decomposition failed ({error})".replace("\n", " "), kept=True)
    if not bool(torch.isfinite(basis).all()):
        return Refreshed(fallback, "its decomposition is not finite", kept=True)
    return Refreshed(_fix_signs(basis, previous), note)


def overlap(new: Tensor, old: Tensor) -> float:
    """Mean squared cosine between two r-dimensional spaces: |Q'^T Q|_F^2 / r; 1 means the same space."""
    return float((new.mT @ old).square().sum() / min(new.shape[-1], old.shape[-1]))


def sketch_seed(name: str, sync_number: int) -> int:
    """Seed of a matrix's Gaussian sketch; the same on every rank that holds the matrix."""
    return zlib.crc32(f"{name}#{sync_number}".encode())


def _leading_left_space(
    target: Tensor,
    previous: Tensor | None,
    rank: int,
    method: str,
    complement: bool,
    seed: int,
    floor: float,
) -> tuple[Tensor, str]:
    if method == "power":
        warm = previous if previous is not None and not complement else None
        basis = _power(lambda x: target @ (target.mT @ x), target, warm, rank, seed, floor)
        if basis is not None:
            return basis, ""
    if method == "svd":
        vectors, values, _ = torch.linalg.svd(target, full_matrices=False)
    else:
        # Also where the power iteration found the space to be deficient: exact, and rare.
        wide = target.to(torch.float64)
        squares, vectors = torch.linalg.eigh(wide @ wide.mT)
        vectors, values = vectors.flip(-1), squares.flip(-1).clamp_min(0).sqrt()
        floor = max(floor, 1e-7)
    significant = min(rank, int((values > floor * values[0]).sum()))
    leading = vectors[:, :significant].to(target.dtype)
    if significant == rank:
        return leading.contiguous(), ""
    note = f"only {significant} of {rank} directions are significant; filled up from the previous basis"
    return _fill_up(leading, previous, rank), note


def _power(
    apply: Callable[[Tensor], Tensor], like: Tensor, warm: Tensor | None, rank: int, seed: int, floor: float
) -> Tensor | None:
    """Subspace iteration Q <- qr(D (D^T Q)); None where a column is lost in rounding noise.

    `apply` maps X (s, r) to D (D^T X); a sharded caller sums r-sized partial products inside it.
    """
    if warm is not None:
        start, iterations = warm, 1
    else:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(like.shape[-2], rank, generator=generator, dtype=torch.float64)
        start, iterations = sketch.to(like), _FIRST_BASIS_ITERATIONS
    for _ in range(iterations):
        image = apply(start)
        start, triangle = torch.linalg.qr(image)
        diagonal = triangle.diagonal()
        lengths = torch.linalg.vector_norm(image, dim=-2)
        # A warm column of length sigma_i^2 carries noise of order eps * sigma_1 * sigma_i.
        noise = floor * (lengths.amax() * lengths).sqrt()
        if not bool((diagonal.abs() > noise).all()):
            return None
        start = start * torch.where(diagonal < 0, -1.0, 1.0)
    return start


def _fill_up(leading: Tensor, previous: Tensor | None, rank: int) -> Tensor:
    """Extend orthonormal columns (s, k) to (s, rank) with columns of the previous basis, then of the identity."""
    size = leading.shape[-2]
    identity = torch.eye(size, dtype=leading.dtype, device=leading.device)
    candidates = identity if previous is None else torch.cat([previous, identity], dim=-1)
    columns = [leading]
    have = leading.shape[-1]
    for candidate in candidates.unbind(-1):
        if have == rank:
            break
        basis = torch.cat(columns, dim=-1)
        residual = candidate
        for _ in range(2):  # twice is enough for orthogonality to rounding
            residual = residual - basis @ (basis.mT @ residual)
        length = torch.linalg.vector_norm(residual)
        if bool(length > 1e-3):
            columns.append((residual / length).unsqueeze(-1))
            have += 1
    return torch.cat(columns, dim=-1)


def _identity_columns(like: Tensor, rank: int) -> Tensor:
    return torch.eye(like.shape[-2], rank, dtype=like.dtype, device=like.device)


def _fix_signs(basis: Tensor, previous: Tensor | None) -> Tensor:
    """Resolve the sign that a decomposition leaves open: towards the previous basis, else largest entry > 0."""
    if previous is not None:
        direction = (basis * previous).sum(dim=-2)
    else:
        direction = basis.gather(-2, basis.abs().argmax(dim=-2, keepdim=True)).squeeze(-2)
    return (basis * torch.where(direction < 0, -1.0, 1.0)).contiguous()
