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
"""Tests for the bound on spectral norms in `_weyl_bound.py`.

The common tests are in `_common_test.py` and `_sharding_test.py`.
"""

import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from optax._src import alias
from optax._src import base
from optax._src import combine
from optax._src import update as optax_update
from optax._src import wrappers
from optax.contrib import _muon
from optax.contrib import _weyl_bound
from optax.transforms import _masking

_DIM_NUMS = _muon.MuonDimensionNumbers


def _normal(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _norm(x):
  """Exact spectral norms of the last two axes."""
  return np.linalg.svd(np.float64(x), compute_uv=False)[..., 0]


def _bound_once(w, u, **kwargs):
  solver = _weyl_bound.scale_by_weyl_bound(**kwargs)
  bounded, _ = jax.jit(solver.update)(u, solver.init(w), w)
  return bounded


class _PaperAdamW2:
  """Algorithm 1 of arXiv:2505.21910 in NumPy float64, with an exact SVD."""

  def __init__(self, w, b1, b2, eps, tau, decay):
    self.w, self.b1, self.b2 = np.float64(w), b1, b2
    self.eps, self.tau, self.decay = eps, tau, decay
    self.m, self.v, self.t = np.zeros_like(self.w), np.zeros_like(self.w), 0

  def step(self, g, rate):
    g, self.t = np.float64(g), self.t + 1
    self.m = self.b1 * self.m + (1 - self.b1) * g
    self.v = self.b2 * self.v + (1 - self.b2) * g**2
    m_hat = self.m / (1 - self.b1**self.t)
    v_hat = self.v / (1 - self.b2**self.t)
    u = m_hat / np.sqrt(v_hat + self.eps)
    alpha = min(rate, self.tau * _norm(self.w) / _norm(u))
    self.w = self.w - alpha * u - alpha * self.decay * self.w
    return alpha < rate


class WeylBoundTest(parameterized.TestCase):

  @parameterized.parameters((6, 8), (8, 6), (30, 5))
  def test_adamw2_is_algorithm_1(self, m, n):
    rate = lambda count: 0.03 / (1 + count)
    w = _normal(0, m, n)
    paper = _PaperAdamW2(w, b1=0.9, b2=0.95, eps=1e-8, tau=0.01, decay=0.1)
    solver = _weyl_bound.adamw2(
        rate, b2=0.95, eps=0, eps_root=1e-8, weight_decay=0.1, min_std=0
    )
    state, bounded, update = solver.init(w), [], jax.jit(solver.update)
    for i in range(20):
      g = _normal(i + 1, m, n)
      bounded.append(paper.step(g, rate(i)))
      updates, state = update(g, state, w)
      w = optax_update.apply_updates(w, updates)
      np.testing.assert_allclose(w, paper.w, rtol=2e-4, atol=2e-5)
    self.assertTrue(any(bounded))
    self.assertFalse(all(bounded))

  @parameterized.parameters((64, 200), (200, 64))
  def test_norms_of_larger_matrices(self, m, n):
    # A spectrum that decays, as that of a trained weight or of Adam's update.
    u, _, vt = np.linalg.svd(_normal(0, m, n), full_matrices=False)
    x = jnp.asarray((u * 0.8 ** np.arange(min(m, n))) @ vt, jnp.float32)
    bounded = _bound_once(x, 7 * x, tau=0.01)
    np.testing.assert_allclose(_norm(bounded), 0.01 * _norm(x), rtol=1e-4)

  @parameterized.parameters(1e-30, 1e-3, 1e30, 1.2e37)
  def test_scales(self, scale):
    x = scale * _normal(0, 20, 8)
    bounded = _bound_once(x, 3 * x, tau=0.01, min_std=0)
    np.testing.assert_allclose(bounded, 0.01 * x, rtol=1e-4)

  def test_what_is_within_the_bound_is_unchanged(self):
    w = _normal(0, 30, 20)
    u = 1e-4 * _normal(1, 30, 20)
    np.testing.assert_array_equal(_bound_once(w, u, tau=0.01), u)

  def test_growth_over_many_updates(self):
    w = first = 0.1 + 0.1 * _normal(0, 40, 30)
    solver = combine.chain(
        alias.adam(0.1), _weyl_bound.scale_by_weyl_bound(0.02)
    )

    @jax.jit
    def step(w, state, i):
      # Gradients of one sign are the worst case: Adam's update has rank 1.
      noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (30,))
      g = -jnp.ones((40, 30)) + 0.1 * noise
      updates, state = solver.update(g, state, w)
      return optax_update.apply_updates(w, updates), state

    state = solver.init(w)
    for i in range(30):
      before = _norm(w)
      w, state = step(w, state, i)
      self.assertLessEqual(_norm(w), before * 1.02 * 1.001)
    self.assertGreater(_norm(w), 1.5 * _norm(first))

  def test_a_new_part_is_seen(self):
    # An update was in one block for long, and then is in another.
    first = jnp.zeros((60, 40)).at[:30, :20].set(_normal(0, 30, 20))
    second = jnp.zeros((60, 40)).at[30:, 20:].set(_normal(1, 30, 20))
    w = _normal(2, 60, 40)
    solver = _weyl_bound.scale_by_weyl_bound(0.01)
    state, update = solver.init(w), jax.jit(solver.update)
    for u in [first] * 10 + [second] * 5:
      bounded, state = update(u, state, w)
    np.testing.assert_allclose(_norm(bounded), 0.01 * _norm(w), rtol=0.1)

  @parameterized.parameters(
      ((4, 6, 5), _DIM_NUMS(1, 2)),
      ((6, 2, 3), _DIM_NUMS(0, (1, 2))),
      ((2, 3, 6), _DIM_NUMS((0, 1), 2)),
      ((6, 4, 5), _DIM_NUMS(0, -1)),
      ((3, 3, 2, 4), _DIM_NUMS((0, 1, 2), 3)),
  )
  def test_dimension_numbers(self, shape, dim_nums):
    w, u = _normal(0, *shape), _normal(1, *shape)
    bounded = _bound_once(w, u, weight_dimension_numbers=dim_nums)
    axes = _muon._normalize_axes(w, dim_nums)
    batch = [i for i in range(len(shape)) if i not in sum(axes, ())]
    sizes = [math.prod(shape[i] for i in group) for group in axes]
    matrices = lambda x: np.transpose(x, (*batch, *axes[0], *axes[1])).reshape(
        -1, *sizes
    )
    np.testing.assert_allclose(
        _norm(matrices(bounded)), 0.01 * _norm(matrices(w)), rtol=1e-3
    )

  def test_leaves_without_dimension_numbers_are_unchanged(self):
    w = {'a': _normal(0, 5, 4), 'b': _normal(1, 3), 'c': None}
    u = jax.tree.map(lambda x: 100 * x, w)
    bounded = _bound_once(w, u)
    np.testing.assert_array_equal(bounded['b'], u['b'])
    self.assertLess(_norm(bounded['a']), _norm(u['a']))
    self.assertIsNone(bounded['c'])
    none = _bound_once(w, u, weight_dimension_numbers={'a': None, 'b': None,
                                                       'c': None})
    np.testing.assert_array_equal(none['a'], u['a'])
    by_function = _bound_once(
        w, u, weight_dimension_numbers=lambda p: {'a': _DIM_NUMS(), 'b': None,
                                                  'c': None})
    np.testing.assert_array_equal(by_function['a'], bounded['a'])

  def test_a_weight_of_zero_moves(self):
    w, u = jnp.zeros((9, 4)), _normal(0, 9, 4)
    bounded = _bound_once(w, u, tau=0.1, min_std=0.01)
    np.testing.assert_allclose(_norm(bounded), 0.1 * 0.01 * 5, rtol=1e-4)
    self.assertFalse(np.any(_bound_once(w, u, min_std=0)))
    self.assertFalse(np.any(_bound_once(u, w)))

  def test_what_is_not_finite_stays_so_and_is_forgotten(self):
    w, u = _normal(0, 20, 30), _normal(1, 20, 30)
    solver = wrappers.apply_if_finite(_weyl_bound.scale_by_weyl_bound(), 3)
    state = solver.init(w)
    _, state = solver.update(u.at[0, 0].set(jnp.nan), state, w)
    self.assertEqual(state.total_notfinite, 1)
    plain = _weyl_bound.scale_by_weyl_bound()
    update = jax.jit(plain.update)
    bounded, state = update(u.at[3].set(jnp.inf), plain.init(w), w)
    self.assertFalse(np.isfinite(bounded).all())
    for _ in range(20):
      bounded, state = update(u, state, w)
    np.testing.assert_allclose(_norm(bounded), 0.01 * _norm(w), rtol=0.01)

  def test_decay_is_scaled_as_the_update(self):
    w, u = _normal(0, 6, 5), 100 * _normal(1, 6, 5)
    bounded = _bound_once(w, u, weight_decay=0.1)
    scale = 0.01 * _norm(w) / _norm(u)
    np.testing.assert_allclose(bounded, scale * (u + 0.1 * w), rtol=1e-3)
    masked = _bound_once(w, u, weight_decay=0.1, mask=False)
    np.testing.assert_allclose(masked, scale * u, rtol=1e-3)

  def test_schedules(self):
    w, u = _normal(0, 6, 5), 100 * _normal(1, 6, 5)
    tau = lambda count: 0.01 * (1 + count)
    # The sign of the rate does not matter.
    rate = lambda count: (-1.0) ** count / (1 + count)
    solver = _weyl_bound.scale_by_weyl_bound(tau, rate)
    state = solver.init(w)
    for i in range(3):
      bounded, state = solver.update(u, state, w)
      np.testing.assert_allclose(
          _norm(bounded) / (1 + i), 0.01 * (1 + i) * _norm(w), rtol=1e-3
      )

  def test_masked(self):
    w = {'a': _normal(0, 5, 4), 'b': _normal(1, 5, 4)}
    u = jax.tree.map(lambda x: 100 * x, w)
    solver = _masking.masked(
        _weyl_bound.scale_by_weyl_bound(), {'a': True, 'b': False}
    )
    bounded, _ = solver.update(u, solver.init(w), w)
    np.testing.assert_allclose(bounded['a'], 0.01 * w['a'], rtol=1e-3)
    np.testing.assert_array_equal(bounded['b'], u['b'])

  def test_params_are_needed(self):
    solver = _weyl_bound.scale_by_weyl_bound()
    with self.assertRaisesRegex(ValueError, base.NO_PARAMS_MSG[:30]):
      solver.update(jnp.eye(3), solver.init(jnp.eye(3)))


if __name__ == '__main__':
  absltest.main()
