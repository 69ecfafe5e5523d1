"""The basis: the leading left space of a matrix (pseudo-gradient or gradient), and its refresh."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# A direction counts as significant while it stands out of the rounding noise by this factor.
_NOISE_FACTOR = 32.0
_FIRST_BASIS_ITERATIONS = 2


@dataclass(frozen=True)
class Refreshed:
    """A new basis, (s, r), orthonormal columns, and what a user should know about how it came to be.

    `note` is empty for an ordinary refresh. `kept` says that the previous basis was kept because the matrix
    was zero or not finite, or its decomposition failed; where there was none, there still is none.
    """

    basis: Tensor | None
    note: str = ""
    kept: bool = False


class LeftMatrix(Protocol):
    """A matrix (s, l) seen from its basis side; a sharded one sums over its shards inside these methods."""

    shape: tuple[int, int]

    def like(self) -> Tensor:
        """Any tensor of the matrix's dtype and device."""

    def peak_and_norm(self) -> tuple[float, float]:
        """Largest absolute value (inf where a value is not finite) and Frobenius norm relative to it."""

    def apply(self, columns: Tensor, scale: float) -> Tensor:
        """(D/scale) (D/scale)^T X, (s, k), for X (s, k)."""

    def full(self, scale: float) -> Tensor:
        """D/scale, (s, l), whole."""

    def agree(self, flag: bool) -> bool:
        """One shard's answer for all of them: control flow must not diverge."""


class WholeMatrix:
    """A `LeftMatrix` held entirely: (s, l), fp32 or fp64, may be a transposed view."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = (matrix.shape[-2], matrix.shape[-1])

    def like(self) -> Tensor:
        return self.matrix

    def peak_and_norm(self) -> tuple[float, float]:
        peak = torch.linalg.vector_norm(self.matrix, float("inf"))
        if not bool(torch.isfinite(peak)):
            return float("inf"), 0.0
        norm = torch.linalg.vector_norm(self.matrix / peak) if bool(peak > 0) else peak
        return float(peak), float(norm)

    def apply(self, columns: Tensor, scale: float) -> Tensor:
        return self.matrix @ (self.matrix.mT @ columns / scale) / scale

    def full(self, scale: float) -> Tensor:
        return self.matrix / scale

    def agree(self, flag: bool) -> bool:
        return flag


def refresh_basis(
    matrix: Tensor | LeftMatrix, previous: Tensor | None, rank: int, *, method: str, source: str, seed: int
) -> Refreshed:
    """Top-r left space of D (or of its part outside the previous basis), or the previous basis, which may be none.

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
    left: LeftMatrix = WholeMatrix(matrix) if isinstance(matrix, Tensor) else matrix
    # Only relative sizes matter, and squares of small pseudo-gradients underflow in fp32.
    scale, norm = left.peak_and_norm()
    if scale == float("inf"):
        return Refreshed(previous, "its matrix is not finite", kept=True)
    if scale == 0.0:
        return Refreshed(previous, "its matrix is zero", kept=True)
    floor = _NOISE_FACTOR * torch.finfo(left.like().dtype).eps
    outside = previous if source == "complement" else None
    if outside is not None:
        inside = float((outside * left.apply(outside, scale)).sum())
        # What projection left over carries the rounding noise of the whole matrix; a full basis leaves only that.
        floor /= max((max(0.0, norm**2 - inside) ** 0.5) / norm, floor)
        if floor >= 1.0 or rank == left.shape[0]:
            return Refreshed(previous, "nothing of its matrix lies outside the previous basis", kept=True)
    try:
        basis, note = _leading_left_space(left, previous, outside, rank, method, seed, scale, floor)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in torch's stubs
        return Refreshed(previous, f"its decomposition failed ({error})".replace("\n", " "), kept=True)
    if not bool(torch.isfinite(basis).all()):
        return Refreshed(previous, "its decomposition is not finite", kept=True)
    return Refreshed(_fix_signs(basis, previous), note)


def overlap(new: Tensor, old: Tensor) -> float:
    """Mean squared cosine between two r-dimensional spaces: |Q'^T Q|_F^2 / r; 1 means the same space."""
    return float((new.mT @ old).square().sum() / min(new.shape[-1], old.shape[-1]))


def sketch_seed(basis_side: int, step: int) -> int:
    """Seed of the Gaussian sketch of matrices with a basis side of that length.

    The same on every rank that holds the matrix, and not a matter of its name, which wrappers and pipelines change.
    """
    return zlib.crc32(f"{basis_side}#{step}".encode())


def _leading_left_space(
    left: LeftMatrix,
    previous: Tensor | None,
    outside: Tensor | None,
    rank: int,
    method: str,
    seed: int,
    scale: float,
    floor: float,
) -> tuple[Tensor, str]:
    if method == "power":
        basis = _power(left, previous if outside is None else None, outside, rank, seed, scale, floor)
        if left.agree(basis is not None):
            assert basis is not None
            return basis, ""
    target = left.full(scale)
    if outside is not None:
        target = target - outside @ (outside.mT @ target)
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
    return fill_up(leading, previous, rank), note


def _power(
    left: LeftMatrix,
    warm: Tensor | None,
    outside: Tensor | None,
    rank: int,
    seed: int,
    scale: float,
    floor: float,
) -> Tensor | None:
    """Subspace iteration Q <- qr(D (D^T Q)), with D's part in `outside` removed; None where a column is noise."""
    like = left.like()
    if warm is not None:
        start, iterations = warm, 1
    else:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(left.shape[0], rank, generator=generator, dtype=torch.float64)
        start, iterations = sketch.to(like), _FIRST_BASIS_ITERATIONS
    significant = True
    for _ in range(iterations):
        image = _remove(left.apply(_remove(start, outside), scale), outside)
        start, triangle = torch.linalg.qr(image)
        diagonal = triangle.diagonal()
        lengths = torch.linalg.vector_norm(image, dim=-2)
        # A warm column of length sigma_i^2 carries noise of order eps * sigma_1 * sigma_i.
        noise = floor * (lengths.amax() * lengths).sqrt()
        significant = significant and bool((diagonal.abs() > noise).all())
        start = start * torch.where(diagonal < 0, -1.0, 1.0)
    return start if significant else None


def _remove(columns: Tensor, basis: Tensor | None) -> Tensor:
    """(I - Q Q^T) X, or X without a basis."""
    return columns if basis is None else columns - basis @ (basis.mT @ columns)


def fill_up(leading: Tensor, previous: Tensor | None, rank: int) -> Tensor:
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


def _fix_signs(basis: Tensor, previous: Tensor | None) -> Tensor:
    """Resolve the sign that a decomposition leaves open: towards the previous column, else largest entry > 0.

    A column orthogonal to its predecessor has no direction towards it but rounding noise.
    """
    largest = basis.gather(-2, basis.abs().argmax(dim=-2, keepdim=True)).squeeze(-2)
    direction = largest
    if previous is not None:
        cosine = (basis * previous).sum(dim=-2)
        direction = torch.where(cosine.abs() > 1e-2, cosine, largest)
    return (basis * torch.where(direction < 0, -1.0, 1.0)).contiguous()
