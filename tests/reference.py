"""Algorithm 1 of arXiv 2505.21910 in NumPy float64, with an exact SVD; and with linear growth.

It knows nothing of the library: matrices are moved to the last two axes by hand.
"""

import math

import numpy as np


def as_matrices(x, reduction, output):
    """An array as a stack of matrices, (*batch, m, n)."""
    batch = [axis for axis in range(x.ndim) if axis not in (*reduction, *output)]
    x = np.transpose(x, (*batch, *reduction, *output))
    sizes = x.shape[len(batch) :]
    m, n = math.prod(sizes[: len(reduction)]), math.prod(sizes[len(reduction) :])
    return x.reshape(*x.shape[: len(batch)], m, n)


def sigma(x, reduction, output):
    """Largest singular values, broadcast against the array."""
    norms = np.linalg.svd(as_matrices(x, reduction, output), compute_uv=False)[..., 0]
    return np.expand_dims(norms, (*reduction, *output))


class AdamW2:
    def __init__(
        self, weights, axes, *, growth, max_std, schedule, tau, b1, b2, eps, decay, decayed
    ):
        self.weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}
        self.m = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.v = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.growth = growth
        self.most = {}
        for name, (reduction, output) in axes.items():
            m, n = as_matrices(self.weights[name], reduction, output).shape[-2:]
            self.most[name] = max_std * (m**0.5 + n**0.5) if reduction else n**0.5
        self.axes, self.schedule, self.tau, self.t = axes, schedule, tau, 0
        self.b1, self.b2, self.eps, self.decay, self.decayed = b1, b2, eps, decay, decayed

    def step(self, grads):
        rate = self.schedule(self.t)
        self.t += 1
        for name, g in grads.items():
            w = self.weights[name]
            self.m[name] = self.b1 * self.m[name] + (1 - self.b1) * g
            self.v[name] = self.b2 * self.v[name] + (1 - self.b2) * g * g
            m_hat = self.m[name] / (1 - self.b1**self.t)
            v_hat = self.v[name] / (1 - self.b2**self.t)
            u = m_hat / np.sqrt(v_hat + self.eps)
            norm = sigma(w, *self.axes[name])
            if self.growth == "linear":
                norm = np.minimum(norm, self.most[name])
            alpha = np.minimum(rate, self.tau * norm / sigma(u, *self.axes[name]))
            decay = self.decay if name in self.decayed else 0.0
            self.weights[name] = w - alpha * u - alpha * decay * w
