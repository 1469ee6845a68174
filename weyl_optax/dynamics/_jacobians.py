r"""Proposition 1 of arXiv 2505.21910: the Jacobians of the logits of attention.

In the paper's layout: the tokens are the columns of :math:`X`, shape (d, n), and
:math:`P = X^\top W_q^\top W_k X`, shape (n, n), with :math:`W_q, W_k` of shape (d_q, d).
`vec` stacks columns, so that :math:`(B \otimes A)\,\mathrm{vec}(V) = \mathrm{vec}(A V B^\top)`,
and :math:`K\,\mathrm{vec}(V) = \mathrm{vec}(V^\top)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kronecker(NamedTuple):
    r"""The operator :math:`B \otimes A`, or :math:`(B \otimes A) K`."""

    left: jax.Array  # B
    right: jax.Array  # A
    transposes: bool  # whether K stands behind it

    def __call__(self, v: jax.Array) -> jax.Array:
        return self.right @ (v.T if self.transposes else v) @ self.left.T

    def matrix(self) -> jax.Array:
        product = jnp.kron(self.left, self.right)
        if not self.transposes:
            return product
        columns = product.reshape(-1, self.left.shape[1], self.right.shape[1])
        return jnp.swapaxes(columns, 1, 2).reshape(product.shape)


class Jacobian(NamedTuple):
    r"""The derivative of P by a matrix V, as a sum of Kronecker products.

    Called with a direction of the shape of V, it gives the change of P, shape (n, n), in
    O(n d) memory.
    """

    terms: tuple[Kronecker, ...]

    def __call__(self, v: jax.Array) -> jax.Array:
        return sum((term(v) for term in self.terms[1:]), start=self.terms[0](v))

    def matrix(self) -> jax.Array:
        r"""The derivative of vec(P) by vec(V), shape (n^2, size of V)."""
        return sum((term.matrix() for term in self.terms[1:]), start=self.terms[0].matrix())


def jacobian_p_wrt_qk(x: jax.Array) -> Jacobian:
    r"""The derivative by W_q^T W_k, :math:`X^\top \otimes X^\top`.

    Its rank is the square of that of :math:`X`: tokens of low rank give gradients of low rank.

    Args:
        x: Tokens, shape (d, n).

    Returns:
        An operator on matrices of shape (d, d).

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import jacobian_p_wrt_qk
        >>> tokens = jnp.ones((3, 2))  # of rank 1
        >>> print(jnp.linalg.matrix_rank(jacobian_p_wrt_qk(tokens).matrix()))
        1
    """
    return Jacobian((Kronecker(x.T, x.T, transposes=False),))


def jacobian_p_wrt_x(x: jax.Array, query: jax.Array, key: jax.Array) -> Jacobian:
    r"""The derivative by X.

    .. math:: (X^\top W_k^\top W_q \otimes I) K + I \otimes X^\top W_q^\top W_k

    Args:
        x: Tokens, shape (d, n).
        query: W_q, shape (d_q, d).
        key: W_k, shape (d_q, d).

    Returns:
        An operator on matrices of shape (d, n).
    """
    identity = jnp.eye(x.shape[1], dtype=x.dtype)
    return Jacobian(
        (
            Kronecker(x.T @ key.T @ query, identity, transposes=True),
            Kronecker(identity, x.T @ query.T @ key, transposes=False),
        )
    )


def jacobian_p_wrt_q(x: jax.Array, key: jax.Array) -> Jacobian:
    r"""The derivative by W_q, :math:`(X^\top W_k^\top \otimes X^\top) K`.

    Args:
        x: Tokens, shape (d, n).
        key: W_k, shape (d_q, d).

    Returns:
        An operator on matrices of shape (d_q, d).
    """
    return Jacobian((Kronecker(x.T @ key.T, x.T, transposes=True),))


def jacobian_p_wrt_k(x: jax.Array, query: jax.Array) -> Jacobian:
    r"""The derivative by W_k, :math:`X^\top \otimes X^\top W_q^\top`.

    Args:
        x: Tokens, shape (d, n).
        query: W_q, shape (d_q, d).

    Returns:
        An operator on matrices of shape (d_q, d).
    """
    return Jacobian((Kronecker(x.T, x.T @ query.T, transposes=False),))
