"""LDAdam in float64 NumPy, read off the paper in the plainest way.

One matrix at a time, the error stored as the paper stores it, every product
formed, Householder QR and LAPACK's SVD. Slow on purpose: nothing here is shared
with the library, so that the two can only agree by being right.

References:
    Robert et al., LDAdam, ICLR 2025, arXiv:2410.16103, Algorithm 1.
"""

import dataclasses

import numpy as np

SIDES = ("short", "long", "left", "right")


def compresses_rows(shape: tuple[int, int], side: str) -> bool:
    rows, cols = shape
    return {
        "short": rows <= cols,
        "long": rows >= cols,
        "left": True,
        "right": False,
    }[side]


@dataclasses.dataclass
class LDAdamMatrix:
    """The optimizer's state for one matrix, and one step of it.

    Attributes:
        shape: Shape of the matrix as stored.
        rank: Rank of the subspace, at most the smaller side.
        start: Orthonormal ``(m, r)`` basis from which the first power step is
            taken, m the compressed side; None starts from the SVD of the
            first gradient.
        basis: U, shape ``(m, r)``.
        mu: First moment, shape ``(r, n)``.
        nu: Second moment, shape ``(r, n)``.
        error: e, in the orientation ``(m, n)``.
        transfer: Q = U^T U' of the last step, shape ``(r, r)``.
        c: b1 / (1 - b1) of the last step: the weight in the error of a momentum that
            that step has made. Hyperparameters may be set anew between steps.
    """

    shape: tuple[int, int]
    rank: int
    b1: float = 0.908
    b2: float = 0.99
    eps: float = 1e-8
    rho: float = 0.908
    side: str = "short"
    subspace: str = "power_iteration"
    residual: str = "error_feedback"
    start: np.ndarray | None = None

    def __post_init__(self):
        self.rows = compresses_rows(self.shape, self.side)
        m, n = self.shape if self.rows else self.shape[::-1]
        self.steps = 0
        self.basis = np.zeros((m, self.rank))
        self.mu = np.zeros((self.rank, n))
        self.nu = np.zeros((self.rank, n))
        self.error = np.zeros((m, n))
        self.transfer = np.zeros((self.rank, self.rank))
        self.c = 0.0

    def error_as_stored(self) -> np.ndarray:
        return self.error if self.rows else self.error.T

    def step(self, grad: np.ndarray) -> np.ndarray:
        """Take one step; return the direction to descend, shaped as stored."""
        grad = np.asarray(grad, np.float64)
        direction = self._step(grad if self.rows else grad.T)
        return direction if self.rows else direction.T

    def _step(self, g: np.ndarray) -> np.ndarray:
        self.steps += 1
        t, b1, b2 = self.steps, self.b1, self.b2
        basis_before, mu_before = self.basis, self.mu
        a = g + self.error

        self.basis = self._next_basis(a)
        self.transfer = self.basis.T @ basis_before
        ghat = self.basis.T @ a
        mhat, vhat = self._carried_moments()

        if self.residual == "error_feedback":
            lost_gradient = a - self.basis @ ghat
            lost_momentum = basis_before @ mu_before - self.basis @ mhat
            self.error = lost_gradient + self.c * lost_momentum
        self.c = b1 / (1 - b1)
        self.mu = b1 * mhat + (1 - b1) * ghat
        self.nu = b2 * vhat + (1 - b2) * ghat**2
        mu_unbiased = self.mu / (1 - b1**t)
        nu_unbiased = self.nu / (1 - b2**t)
        return self.basis @ (mu_unbiased / (np.sqrt(nu_unbiased) + self.eps))

    def _next_basis(self, a: np.ndarray) -> np.ndarray:
        if self.steps == 1:
            if self.start is None:
                return leading_left_vectors(a, self.rank)
            if self.subspace == "svd":
                return leading_left_vectors(a, self.rank)
            self.basis = np.asarray(self.start, np.float64)
            followed = a
        else:
            momentum = self.basis @ self.mu / (1 - self.b1 ** (self.steps - 1))
            followed = self.rho * momentum + (1 - self.rho) * a
        if self.subspace == "svd":
            return leading_left_vectors(followed, self.rank)
        return power_step(followed, self.basis)

    def _carried_moments(self) -> tuple[np.ndarray, np.ndarray]:
        if self.steps == 1:
            return np.zeros_like(self.mu), np.zeros_like(self.nu)
        bias1 = 1 - self.b1 ** (self.steps - 1)
        bias2 = 1 - self.b2 ** (self.steps - 1)
        mhat = self.transfer @ self.mu
        variance = self.nu / bias2 - (self.mu / bias1) ** 2
        second = self.transfer**2 @ variance + (mhat / bias1) ** 2
        return mhat, bias2 * np.abs(second)


def leading_left_vectors(matrix: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def power_step(matrix: np.ndarray, basis: np.ndarray) -> np.ndarray:
    panel = matrix @ (matrix.T @ basis)
    return np.linalg.qr(panel)[0] if panel.any() else basis


@dataclasses.dataclass
class AdamVector:
    """Plain Adam, for what is not compressed."""

    shape: tuple[int, ...]
    b1: float = 0.908
    b2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self):
        self.steps = 0
        self.mu = np.zeros(self.shape)
        self.nu = np.zeros(self.shape)

    def step(self, grad: np.ndarray) -> np.ndarray:
        self.steps += 1
        self.mu = self.b1 * self.mu + (1 - self.b1) * grad
        self.nu = self.b2 * self.nu + (1 - self.b2) * grad**2
        mu_unbiased = self.mu / (1 - self.b1**self.steps)
        nu_unbiased = self.nu / (1 - self.b2**self.steps)
        return mu_unbiased / (np.sqrt(nu_unbiased) + self.eps)


def descend(param, direction, learning_rate, weight_decay=0.0):
    """One step of decoupled weight decay (AdamW's rule)."""
    return param - learning_rate * (direction + weight_decay * param)
