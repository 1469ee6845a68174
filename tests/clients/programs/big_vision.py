"""big_vision's ViT and loss. Its train step stands inside of its `main`, so that it is Optax's."""

import big_vision
import jax
import jax.numpy as jnp
from table import CONV, DENSE, OUT, QUERY, case, commit, plain_training, stand_in

from weyl_optax import dimension_numbers_from

stand_in("tensorflow", "tensorflow.io", "tensorflow.io.gfile")

from big_vision.models import vit  # noqa: E402
from big_vision.utils import sigmoid_xent  # noqa: E402

ENTRIES = ((), (0, 1))
USES = {
    "embedding/kernel": CONV,
    "cls": ((), (2,)),
    "*/probe": ((), (2,)),
    "pos_embedding": ((), (1, 2)),
    "head/kernel": DENSE,
    # Layers that are scanned come first.
    "Transformer/encoderblock/*/out/kernel": ((1, 2), (3,)),
    "Transformer/encoderblock/*/Dense_?/kernel": ((1,), (2,)),
    "Transformer/encoderblock/*Attention_0/[qkv]*/kernel": ((1,), (2, 3)),
    "Transformer/encoderblock/*Attention_0/[qkv]*/bias": ((), (1, 2)),
    "Transformer/encoderblock/*": ((), (1,)),
    "*/out/kernel": OUT,
    "*/Dense_?/kernel": DENSE,
    "*Attention_0/[qkv]*/kernel": QUERY,
    "*Attention_0/[qkv]*/bias": ENTRIES,
}


def vision_transformer(**config):
    config = {"width": 8, "mlp_dim": 12, "num_heads": 2, "patch_size": (4, 4), "depth": 2} | config
    model = vit.Model(num_classes=5, **config)
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    labels = jax.nn.one_hot(jnp.arange(3), 5)
    params = model.init(jax.random.key(1), images)["params"]

    def loss(params, images, labels):
        logits, _ = model.apply({"params": params}, images, train=True)
        return sigmoid_xent(logits=logits, labels=labels)

    numbers = dimension_numbers_from(loss, params, images, labels)
    return numbers, params, USES, plain_training(loss, params, images, labels)


@case(f"big_vision ViT ({commit(big_vision.__path__[0])}), class token")
def class_token():
    return vision_transformer(pool_type="tok")


@case("the same, attention pooling")
def attention_pooling():
    return vision_transformer(pool_type="map")


@case("the same, scanned, average pooling")
def scanned():
    return vision_transformer(pool_type="gap", scan=True)


@case("the same, scanned, attention pooling")
def scanned_with_attention_pooling():
    return vision_transformer(pool_type="map", scan=True)
