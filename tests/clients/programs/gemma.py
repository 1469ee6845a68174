"""Gemma's Linen modules, a block and its embedder, without Kauldron.

Kauldron, with which it is trained, wants Python 3.12. In these modules it only checks types and
gives a name to the attention weights.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from table import DENSE, OUT, case, commit, plain_training, stand_in

from weyl_optax import dimension_numbers_from

stand_in("kauldron", "kauldron.ktyping")

from gemma.gm.nn import _modules as gemma  # noqa: E402

gemma.kd.nn.Identity.return_value = lambda x: x

TOKENS = jnp.arange(12).reshape(2, 6) % 7
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))
USES = {
    "embedder/input_embedding": DENSE,
    "*/attn_vec_einsum/w": OUT,
    "*/q_einsum/w": ((1,), (0, 2)),
    "*/kv_einsum/w": ((2,), (0, 1, 3)),
    "*/gating_einsum": ((2,), (0, 1)),
    "*/linear": DENSE,
}


class Gemma(nn.Module):
    def setup(self):
        self.embedder = gemma.Embedder(vocab_size=7, embed_dim=8)
        self.block = gemma.Block(
            num_heads=4,
            num_kv_heads=2,
            embed_dim=8,
            head_dim=6,
            hidden_dim=12,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attn_type=gemma.AttentionType.GLOBAL,
            query_pre_attn_scalar=6**-0.5,
            transpose_gating_einsum=True,
            use_qk_norm=True,
        )

    def __call__(self, tokens):
        mask = jnp.tril(jnp.ones((2, 6, 6), bool))
        _, x = self.block(self.embedder.encode(tokens), POSITIONS, None, mask)
        return self.embedder.decode(x)


@case(f"Gemma ({commit(os.environ['SOURCES'])}), a block and its embedder (Linen)")
def block():
    model = Gemma()
    params = model.init(jax.random.key(0), TOKENS)["params"]

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    numbers = dimension_numbers_from(loss, params, TOKENS)
    return numbers, params, USES, plain_training(loss, params, TOKENS)
