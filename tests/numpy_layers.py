"""The layers of the models in NumPy float64; `p` has the parameters of a layer."""

import math

import jax
import numpy as np
from flax import nnx

from models import hugging_face


def random_model(kind, config, seed=0):
    """A model whose biases and scales count too; NumPy draws them, as it need not compile."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        return rng.normal(1.0 if path.endswith("scale") else 0.0, 0.3, shape)

    return hugging_face.make(
        kind, config, nnx.Rngs(seed), lambda like: {p: draw(p, x.shape) for p, x in like.items()}
    )


@nnx.jit
def forward(model, inputs):
    return model(inputs)


def lines_traced(kind, config, make_inputs):
    """The length of the program that a model is."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    jaxpr = jax.make_jaxpr(lambda s: nnx.merge(graph, nnx.as_pure(s))(make_inputs()))(state)
    return len(str(jaxpr).splitlines())


def parameters(module):
    """The parameters of an NNX module, as nested dicts in float64."""

    def as_float64(tree):
        if isinstance(tree, dict):
            return {key: as_float64(value) for key, value in tree.items()}
        return np.asarray(tree, np.float64)

    return as_float64(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def block_of(p, index):
    """One block of a stack."""
    return {k: block_of(v, index) if isinstance(v, dict) else v[index] for k, v in p.items()}


def layer_norm(x, p, epsilon):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * p["scale"] + p.get("bias", 0)


def rms_norm(x, p, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"]


def linear(x, p):
    """From the last axis to however many the kernel has."""
    return np.tensordot(x, p["kernel"], axes=1) + p.get("bias", 0)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(x, p, allowed):
    """Of tokens (batch, time, width), to the keys that `allowed` (time, time) has."""
    q, k, v = (np.swapaxes(linear(x, p[name]), 1, 2) for name in ("query", "key", "value"))
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    y = softmax(np.where(allowed, scores, -np.inf)) @ v
    return np.einsum("bnth,nhd->btd", y, p["out"]["kernel"]) + p["out"].get("bias", 0)


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mlp(x, p, gelu):
    return linear(gelu(linear(x, p["up"])), p["down"])
