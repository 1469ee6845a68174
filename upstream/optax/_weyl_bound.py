# Copyright 2026 DeepMind Technologies Limited. All Rights Reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ==============================================================================
"""AdamW2: AdamW with a bound on the growth of spectral norms.

Implementation of "Taming Transformer Without Using Learning Rate Warmup"
(https://arxiv.org/abs/2505.21910) by Qi et al.
"""

import math
from typing import Any, Callable, NamedTuple, Optional, Union

import jax
import jax.numpy as jnp

from optax._src import base
from optax._src import combine
from optax._src import numerics
from optax._src import transform
from optax.contrib import _muon

_BLOCK_SIZE = 8  # Vectors that are searched together.
_COLD_ITERS = 16  # Iterations from random vectors, in the first update.
_LARGEST = 2.0**126  # XLA takes the reciprocal of a larger number for zero.


def _unit(x):
  """The columns of a matrix over their lengths; those that are zero stay."""
  largest = jnp.max(jnp.abs(x), axis=0)
  # No square over- or underflows.
  x /= jnp.where(largest > 0, jnp.minimum(largest, _LARGEST), 1)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=0), 1)


def _orthonormalize(x):
  """Gram-Schmidt, twice. A column that depends on those before it is zero."""
  x = _unit(x)

  def add_column(i, q):
    column = x[:, i]
    for _ in range(2):
      column -= q @ (q.T @ column)
    norm = jnp.linalg.norm(column)
    unit = jnp.where(norm > 1e-5, column / jnp.where(norm > 0, norm, 1), 0)
    return q.at[:, i].set(unit)

  return jax.lax.fori_loop(0, x.shape[1], add_column, jnp.zeros_like(x))


def _largest_eigenvalue(gram):
  """Of a small positive semi-definite matrix, by squaring it."""
  divide = lambda x: x / jnp.where((trace := jnp.trace(x)) > 0, trace, 1)
  square = lambda _, projector: divide(projector @ projector)
  return jnp.sum(gram * jax.lax.fori_loop(0, 8, square, divide(gram)))


def _iterate(matrix, block, seed):
  """One step of orthogonal iteration, from k vectors along the shorter side.

  Returns the norm, estimated from below and exact where k is that side, and the
  next block, with the most important vectors first.
  """
  times = lambda v: matrix @ v
  transpose_times = lambda v: (v.T @ matrix).T  # XLA on CPU copies a matrix.T
  if matrix.shape[0] < matrix.shape[1]:
    times, transpose_times = transpose_times, times
  # Vectors that are searched for long do not see what is new in a matrix.
  key = jax.random.fold_in(jax.random.PRNGKey(0), seed)
  fresh = jax.random.normal(key, block.shape[:1], block.dtype)
  block = block.at[:, -1].set(fresh)
  back = transpose_times(_orthonormalize(times(block)))
  largest = jnp.minimum(jnp.max(jnp.abs(back)), _LARGEST)
  back /= jnp.where(largest > 0, largest, 1)
  norm = largest * jnp.sqrt(_largest_eigenvalue(back.T @ back))
  lengths = jnp.linalg.norm(back, axis=0)
  # Where the matrix is zero or not finite, the block stays.
  block = jnp.where(lengths > 1e-5, _unit(back), block)
  return norm, block[:, jnp.argsort(-lengths)]


def _matrices(x, dim_nums):
  """Those of a leaf, (batch, m, n), in float32 at least."""
  reshape_fn, _ = _muon._compute_muon_reshape(x, dim_nums)
  return reshape_fn(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


@jax.jit
@jax.default_matmul_precision('highest')
def _search(matrices, blocks, count):
  """The norms of matrices, (batch,), and the next blocks."""
  iterate = jax.vmap(_iterate, in_axes=(0, 0, None))
  step = lambda i, x: iterate(matrices, x[1], count * _COLD_ITERS + i)
  start = jnp.zeros(len(matrices), matrices.dtype), blocks
  num_iters = jnp.where(count == 0, _COLD_ITERS, 1)
  return jax.lax.fori_loop(0, num_iters, step, start)


def _norms(x, blocks, dim_nums, count):
  """The norm of every matrix of a leaf, of the leaf's rank; the next blocks."""

  def norms_of(x, blocks, count):
    norms, blocks = _search(_matrices(x, dim_nums), blocks, count)
    axes = sum(_muon._normalize_axes(x, dim_nums), ())
    batch = [1 if i in axes else size for i, size in enumerate(x.shape)]
    return norms.reshape(batch), blocks

  if jax.typeof(x).sharding.mesh.explicit_axes:
    norms_of = jax.sharding.auto_axes(norms_of, out_sharding=jax.P())
  return norms_of(x, blocks, count)


class WeylBoundState(NamedTuple):
  """State for :func:`optax.contrib.scale_by_weyl_bound`."""
  count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32.
  # Trees like the params, of shapes (batch, n, k); None where not bounded.
  weight_blocks: base.Params
  update_blocks: base.Updates


def scale_by_weyl_bound(
    tau: base.ScalarOrSchedule = 0.01,
    learning_rate: base.ScalarOrSchedule = 1.0,
    weight_decay: base.ScalarOrSchedule = 0.0,
    mask: Optional[Union[Any, Callable[[base.Params], Any]]] = None,
    *,
    min_std: jax.typing.ArrayLike = 1e-3,
    weight_dimension_numbers: Optional[_muon.WeightDimNumOrFn] = None,
) -> base.GradientTransformationExtraArgs:
  r"""Bound the growth of the spectral norm of every weight matrix.

  A Transformer whose matrices keep :math:`\|W_t\|_2 \leq (1 + \tau)
  \|W_{t-1}\|_2` trains at its full learning rate from the first step, without
  warmup. By Weyl's inequality, :math:`\sigma_1(W - \alpha U) \leq \sigma_1(W) +
  \alpha \sigma_1(U)`, it is enough that an update :math:`U_t` takes the step

  .. math::
    \begin{align*}
      \alpha_t &= \min\left(\eta_t, \tau \frac{\max(\sigma_1(W_{t-1}),
        s (\sqrt{m} + \sqrt{n}))}{\sigma_1(U_t)}\right) \\
      W_t &= W_{t-1} - \alpha_t U_t - \alpha_t \lambda W_{t-1},
    \end{align*}

  with the learning rate :math:`\eta_t` and the weight decay :math:`\lambda`.
  The term with :math:`s` (``min_std``), the norm of an :math:`m \times n`
  Gaussian matrix of that deviation, lets a weight that starts at zero move.
  This transformation multiplies updates by :math:`\alpha_t / \eta_t \leq 1`.

  Norms are estimated by a step of orthogonal iteration on 8 kept vectors.

  Args:
    tau: Largest growth of a spectral norm in an update, relative. The paper
      uses 0.003 to 0.004 for ViT, and 0.01 for GPT.
    learning_rate: That of :func:`optax.scale_by_learning_rate`, which follows;
      1.0 after a whole optimizer, which then has the weight decay too.
    weight_decay: Added after the update is measured, and scaled like it.
    mask: The leaves to decay, see :func:`optax.add_decayed_weights`.
    min_std: The least deviation that counts, 0 for the rule of the paper.
    weight_dimension_numbers: A tree like the params of
      ``MuonDimensionNumbers``, or ``None`` for leaves that are not bounded; or
      a function from params to it. By default, leaves of rank 2 are bounded.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs`; it needs the params.

  Examples:
    >>> import optax, jax.numpy as jnp
    >>> bound = optax.contrib.scale_by_weyl_bound(tau=0.01)
    >>> solver = optax.chain(optax.lion(0.1), bound)
    >>> params = {'w': jnp.eye(3)}
    >>> updates, _ = solver.update(params, solver.init(params), params)
    >>> print(f'{jnp.linalg.norm(updates["w"], 2):.3f}')
    0.010

  References:
    Qi et al, `Taming Transformer Without Using Learning Rate Warmup
    <https://arxiv.org/abs/2505.21910>`_, 2025
  """
  decay = transform.add_decayed_weights(weight_decay, mask)

  def dim_nums_of(params):
    if weight_dimension_numbers is None:
      matrix = _muon.MuonDimensionNumbers()
      return jax.tree.map(lambda p: matrix if p.ndim == 2 else None, params)
    if callable(weight_dimension_numbers):
      return weight_dimension_numbers(params)
    return weight_dimension_numbers

  def init_fn(params):
    def blocks_of(p, dim_nums):
      if dim_nums is None:
        return None
      like = jax.eval_shape(lambda p: _matrices(p, dim_nums), p)
      n = min(like.shape[1:])
      shape = (like.shape[0], n, min(n, _BLOCK_SIZE))
      return jax.random.normal(jax.random.PRNGKey(0), shape, like.dtype)

    blocks = lambda: jax.tree.map(blocks_of, params, dim_nums_of(params))
    return WeylBoundState(jnp.zeros([], jnp.int32), blocks(), blocks())

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(base.NO_PARAMS_MSG)
    now = lambda x: x(state.count) if callable(x) else x
    decayed, _ = decay.update(updates, decay.init(params), params)

    def bound(u, w, decayed, weight_blocks, update_blocks, dim_nums):
      if u is None or dim_nums is None:
        return decayed, None, None
      norm_w, weight_blocks = _norms(w, weight_blocks, dim_nums, state.count)
      norm_u, update_blocks = _norms(u, update_blocks, dim_nums, state.count)
      m, n = _muon._get_shape_products(w, dim_nums)
      least = min_std * (math.sqrt(m) + math.sqrt(n))
      allowed = now(tau) * jnp.maximum(norm_w, least)
      wanted = jnp.abs(now(learning_rate)) * norm_u
      # NaN is not <= anything: what is not finite stays so.
      scale = jnp.where(wanted <= allowed, 1, allowed / wanted)
      return (scale * decayed).astype(u.dtype), weight_blocks, update_blocks

    trees = (params, decayed, *state[1:], dim_nums_of(params))
    leaves, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    bounded = list(map(bound, leaves, *map(treedef.flatten_up_to, trees)))
    part = lambda i: treedef.unflatten([x[i] for x in bounded])
    count = numerics.safe_increment(state.count)
    return part(0), WeylBoundState(count, part(1), part(2))

  return base.GradientTransformationExtraArgs(init_fn, update_fn)


def adamw2(
    learning_rate: base.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Optional[jax.typing.DTypeLike] = None,
    weight_decay: base.ScalarOrSchedule = 1e-4,
    mask: Optional[Union[Any, Callable[[base.Params], Any]]] = None,
    *,
    nesterov: bool = False,
    tau: base.ScalarOrSchedule = 0.01,
    min_std: jax.typing.ArrayLike = 1e-3,
    weight_dimension_numbers: Optional[_muon.WeightDimNumOrFn] = None,
) -> base.GradientTransformationExtraArgs:
  r"""AdamW with a bound on the growth of spectral norms, without warmup.

  The update of :func:`optax.scale_by_adam`, and the step of
  :func:`optax.contrib.scale_by_weyl_bound`. Algorithm 1 of the paper has
  ``eps=0`` with ``eps_root`` set, and ``min_std=0``.

  Args:
    learning_rate: The largest step; a schedule needs no warmup.
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment.
    eps: Added to the denominator, outside of the square root.
    eps_root: Added to the denominator, inside of the square root.
    mu_dtype: Data type of the first moment.
    weight_decay: Strength of the decay, times the bounded learning rate.
    mask: The leaves to decay, see :func:`optax.adamw`.
    nesterov: Whether to use Nesterov momentum.
    tau: See :func:`optax.contrib.scale_by_weyl_bound`, also for what follows.
    min_std: The least deviation of a weight that counts.
    weight_dimension_numbers: How leaves are read as matrices.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import optax, jax.numpy as jnp
    >>> solver = optax.contrib.adamw2(learning_rate=0.1)
    >>> params = {'w': jnp.eye(2)}
    >>> updates, _ = solver.update(params, solver.init(params), params)
    >>> print(f'{jnp.linalg.norm(updates["w"], 2):.3f}')
    0.010

  References:
    Qi et al, `Taming Transformer Without Using Learning Rate Warmup
    <https://arxiv.org/abs/2505.21910>`_, 2025
  """
  return combine.chain(
      transform.scale_by_adam(
          b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov
      ),
      scale_by_weyl_bound(
          tau, learning_rate, weight_decay, mask, min_std=min_std,
          weight_dimension_numbers=weight_dimension_numbers,
      ),
      transform.scale_by_learning_rate(learning_rate),
  )
