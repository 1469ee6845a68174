"""Each layer's kernel is read as the matrix that it multiplies its inputs by."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from weyl_optax import adamw2, tabulate
from weyl_optax.flax import dimension_numbers

ATTENTION = ("query", "key", "value", "out")


def readings(params, numbers):
    """Path -> how it is read, from the table."""
    rows = [row.split(maxsplit=1) for row in tabulate(params, numbers).splitlines()[1:]]
    return {path: rest.rpartition(")")[2].strip() for path, rest in rows}


def read(shapes, **kwargs):
    """The readings of the leaves of a nested dict of shapes."""
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return readings(params, dimension_numbers(params, **kwargs))


def nnx_readings(model, *wrt):
    return readings(nnx.state(model, *(wrt or (nnx.Param,))), dimension_numbers(model, *wrt))


class Scale(nnx.Module):
    """A layer of the user's own, as LayerScale."""

    def __init__(self, rngs):
        self.gamma = nnx.Param(jnp.ones(6))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 4, rngs=rngs)
        self.general = nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs)
        self.heads = nnx.LinearGeneral(6, 4, batch_axis={0: 3}, rngs=rngs)
        self.einsum = nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=rngs)
        self.experts = nnx.Einsum("etd,edf->etf", (5, 6, 7), (5, 7), rngs=rngs)
        self.conv = nnx.Conv(3, 10, kernel_size=(5, 5), rngs=rngs)
        self.conv1d = nnx.Conv(3, 10, kernel_size=(5,), rngs=rngs)
        self.depthwise = nnx.Conv(10, 10, (5, 5), feature_group_count=10, rngs=rngs)
        self.up = nnx.ConvTranspose(3, 10, kernel_size=(2, 2), rngs=rngs)
        self.up_t = nnx.ConvTranspose(10, 3, (2, 2), transpose_kernel=True, rngs=rngs)
        self.embed = nnx.Embed(20, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(6, rngs=rngs)
        self.prelu = nnx.PReLU()
        self.position = nnx.Param(jnp.ones((9, 6)))
        self.scale = Scale(rngs)


LAYERS = {
    "linear/kernel": "1 matrix of 6 x 4",
    "linear/bias": "1 vector of 4",
    "general/kernel": "1 matrix of 6 x 20",
    "general/bias": "1 vector of 20",
    "heads/kernel": "3 matrices of 6 x 4",
    "heads/bias": "3 vectors of 4",
    "einsum/kernel": "1 matrix of 2 x 32",
    "einsum/bias": "1 vector of 32",
    "experts/kernel": "5 matrices of 6 x 7",
    "experts/bias": "5 vectors of 7",
    "conv/kernel": "1 matrix of 75 x 10",
    "conv/bias": "1 vector of 10",
    "conv1d/kernel": "1 matrix of 15 x 10",
    "conv1d/bias": "1 vector of 10",
    "depthwise/kernel": "10 vectors of 25",
    "depthwise/bias": "1 vector of 10",
    "up/kernel": "1 matrix of 12 x 10",
    "up/bias": "1 vector of 10",
    "up_t/kernel": "1 matrix of 40 x 3",
    "up_t/bias": "1 vector of 3",
    "embed/embedding": "1 matrix of 20 x 6",
    **{f"attention/{n}/kernel": "1 matrix of 6 x 6" for n in ("query", "key", "value", "out")},
    **{f"attention/{n}/bias": "1 vector of 6" for n in ("query", "key", "value", "out")},
    "norm/scale": "1 vector of 6",
    "norm/bias": "1 vector of 6",
    "batch_norm/scale": "1 vector of 6",
    "batch_norm/bias": "1 vector of 6",
    "prelu/negative_slope": "1 scalar",
    "position": "1 matrix of 9 x 6",
    "scale/gamma": "1 vector of 6",
}


def test_nnx_layers():
    model = nnx.eval_shape(lambda: Layers(nnx.Rngs(0)))
    assert nnx_readings(model) == LAYERS


def test_nnx_layers_stacked_by_vmap():
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs):
                return Layers(rngs)

            self.layers = make(rngs)

    read = nnx_readings(nnx.eval_shape(lambda: Stacked(nnx.Rngs(0))))
    for path, reading in LAYERS.items():
        count, _, rest = reading.partition(" ")
        rest = rest.replace("matrix", "matrices").replace("vector ", "vectors ")
        rest = rest.replace("scalar", "scalars")
        if path == "position":  # no layer of Flax tells that its first axis is a batch axis
            rest = "matrices of 9 x 6"
        assert read[f"layers/{path}"] == f"{3 * int(count)} {rest}"


def test_nnx_lora_parameters_alone():
    model = nnx.LoRALinear(12, 10, lora_rank=2, rngs=nnx.Rngs(0))
    assert nnx_readings(model, nnx.LoRAParam) == {
        "lora/lora_a": "1 matrix of 12 x 2",
        "lora/lora_b": "1 matrix of 2 x 10",
    }


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, 6)(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.LayerNorm()(x)
        x = nn.Dense(5)(x)
        return nn.Dense(9, use_bias=False)(x)


LINEN = {
    "Embed_0/embedding": "1 matrix of 7 x 6",
    **{f"attention/{n}/kernel": "1 matrix of 6 x 6" for n in ("query", "key", "value", "out")},
    **{f"attention/{n}/bias": "1 vector of 6" for n in ("query", "key", "value", "out")},
    "LayerNorm_0/scale": "1 vector of 6",
    "LayerNorm_0/bias": "1 vector of 6",
    "Dense_0/kernel": "1 matrix of 6 x 5",
    "Dense_0/bias": "1 vector of 5",
    "Dense_1/kernel": "1 matrix of 5 x 9",
}


def linen_params(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def test_linen_names():
    params = linen_params(Linen(), jnp.ones((2, 5), int))
    assert readings(params, dimension_numbers(params)) == LINEN


def test_linen_attention_alone():
    params = linen_params(nn.MultiHeadDotProductAttention(num_heads=2), jnp.ones((2, 5, 6)))
    read = readings(params, dimension_numbers(params))
    assert read == {
        **{f"{n}/kernel": "1 matrix of 6 x 6" for n in ("query", "key", "value", "out")},
        **{f"{n}/bias": "1 vector of 6" for n in ("query", "key", "value", "out")},
    }


def test_linen_blocks_stacked_by_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.LayerNorm()(x)
            y = nn.MultiHeadDotProductAttention(2, name="attention")(y)
            y = nn.Dense(24, name="up")(y)
            return x + nn.Dense(6, use_bias=False, name="down")(y), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = linen_params(stack, jnp.ones((2, 5, 6)), None)
    assert readings(params, dimension_numbers(params)) == {
        "LayerNorm_0/scale": "3 vectors of 6",
        "LayerNorm_0/bias": "3 vectors of 6",
        **{
            f"attention/{n}/kernel": "3 matrices of 6 x 6" for n in ("query", "key", "value", "out")
        },
        **{f"attention/{n}/bias": "3 vectors of 6" for n in ("query", "key", "value", "out")},
        "up/kernel": "3 matrices of 6 x 24",
        "up/bias": "3 vectors of 24",
        "down/kernel": "3 matrices of 24 x 6",
    }


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv(3, (2,)),
        nn.Conv(3, (2,), use_bias=False),
        nn.Conv(8, (3, 3), feature_group_count=2),
        nn.Conv(4, (3, 3), feature_group_count=4),
        nn.ConvTranspose(4, (3, 3), transpose_kernel=True),
        nn.DenseGeneral((2, 4)),
        nn.DenseGeneral(5, axis=(-2, -1)),
    ],
)
def test_the_params_of_a_linen_layer_with_more_axes_do_not_tell(layer):
    params = {"layer": linen_params(layer, jnp.ones((1, 5, 5, 4)))}
    with pytest.raises(ValueError, match=r"'layer/(kernel|bias)' of shape \(") as error:
        dimension_numbers(params)
    for advice in ("dimension_numbers_from(", "overrides={'layer/", "layer_axes={"):
        assert advice in str(error.value)


@pytest.mark.parametrize(
    "shapes",
    [
        {"projection": {"kernel": (6, 2, 4)}},
        {"norm": {"scale": (6,)}, "projection": {"kernel": (6, 2, 4)}},
        {"layers": {"kernel": (3, 6, 6), "bias": (3, 6)}},
        {"query": {"kernel": (3, 16, 16), "bias": (3, 16)}},
        # Dense layers stacked along axis 1, or attention without biases with 4 heads of 4
        {n: {"kernel": (4, 4, 16) if n == "out" else (16, 4, 4)} for n in ATTENTION},
        # stacked along axis -1: 64 of 32 x 5, or along axis -2: 5 of 32 x 64
        {"Dense_0": {"kernel": (32, 5, 64), "bias": (5, 64)}},
        {"norm": {"scale": (12, 768)}},
        {"blocks": {"gamma": (12, 768)}},
        {"embed": {"embedding": (2, 3, 4)}},
        {"norm": {"scale": (6,)}, "filter": (3, 4, 5)},
    ],
)
def test_what_names_and_shapes_do_not_tell_is_an_error(shapes):
    with pytest.raises(ValueError, match=r"do not tell how to read the leaf '.*' of shape \("):
        read(shapes)


@pytest.mark.parametrize("shape", [(), (8,)])
@pytest.mark.parametrize("name", ["scale", "bias", "embedding", "kernel"])
def test_leaves_of_rank_0_and_1_are_scalars_and_vectors(name, shape):
    assert read({"head": {name: shape}}) == {
        f"head/{name}": "1 vector of 8" if shape else "1 scalar"
    }


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (8, 1, 1)])
def test_a_scale_that_is_broadcast_is_one_vector(shape):
    assert read({"norm": {"scale": shape, "bias": shape}}) == {
        "norm/scale": "1 vector of 8",
        "norm/bias": "1 vector of 8",
    }


def test_a_scale_of_rank_4_is_no_evidence_of_stacked_convolutions():
    shapes = {"norm": {"scale": (1, 1, 1, 16)}, "conv": {"kernel": (3, 3, 16, 8)}}
    with pytest.raises(ValueError, match="'conv/kernel' of shape \\(3, 3, 16, 8\\)"):
        read(shapes)
    read_as = read(shapes, overrides={"*conv*/kernel": MuonDimensionNumbers((0, 1, 2), 3)})
    assert read_as == {"norm/scale": "1 vector of 16", "conv/kernel": "1 matrix of 144 x 8"}


def test_linen_dense_layers_with_the_names_of_attention():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return sum(nn.Dense(16, name=name)(x) for name in ATTENTION)

    params = linen_params(Attention(), jnp.ones((2, 6)))
    assert readings(params, dimension_numbers(params)) == {
        **{f"{name}/kernel": "1 matrix of 6 x 16" for name in ATTENTION},
        **{f"{name}/bias": "1 vector of 16" for name in ATTENTION},
    }
    assert read({"value": {"kernel": (6, 1), "bias": (1,)}})["value/kernel"] == "1 matrix of 6 x 1"
    stacked = {"norm": {"scale": (3, 16)}, "query": {"kernel": (3, 16, 16), "bias": (3, 16)}}
    assert read(stacked) == {
        "norm/scale": "3 vectors of 16",
        "query/kernel": "3 matrices of 16 x 16",
        "query/bias": "3 vectors of 16",
    }


def test_linen_attention_without_bias_by_sizes_that_no_stack_has():
    kernels = {n: {"kernel": (2, 3, 6) if n == "out" else (6, 2, 3)} for n in ATTENTION}
    assert set(read(kernels).values()) == {"1 matrix of 6 x 6"}
    alike = {n: {"kernel": (4, 4, 16) if n == "out" else (16, 4, 4)} for n in ATTENTION}
    assert set(read(alike, layer_axes={}).values()) == {"1 matrix of 16 x 16"}
    stacked = {n: {"kernel": (16, 4, 4)} for n in ATTENTION}
    assert set(read(stacked, layer_axes={"": 2}).values()) == {"4 matrices of 16 x 4"}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(64, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(32, use_bias=False, name="down")(y), None


MLP = {
    "LayerNorm_0/scale": "5 vectors of 32",
    "LayerNorm_0/bias": "5 vectors of 32",
    "up/kernel": "5 matrices of 32 x 64",
    "up/bias": "5 vectors of 64",
    "down/kernel": "5 matrices of 64 x 32",
}


def scanned(axis, block=Mlp):
    stack = nn.scan(
        block,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=5,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return linen_params(stack(), jnp.ones((2, 32)), None)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_linen_blocks_stacked_along_any_axis(axis):
    params = scanned(axis)
    assert readings(params, dimension_numbers(params)) == MLP
    numbers = dimension_numbers({"layers": params}, layer_axes={"layers": axis})
    assert readings({"layers": params}, numbers) == {f"layers/{p}": r for p, r in MLP.items()}


def test_linen_dense_stacked_alone_by_its_bias():
    read_as = read({"Dense_0": {"kernel": (32, 5, 64), "bias": (64, 5)}})
    assert read_as == {"Dense_0/kernel": "5 matrices of 32 x 64", "Dense_0/bias": "5 vectors of 64"}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_partition_name_of_layers_tells_their_axis(axis):
    class Partitioned(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(32, use_bias=False, kernel_init=init, name="dense")(x), None

    params = scanned(axis, Partitioned)
    assert isinstance(params["dense"]["kernel"], nn.LogicallyPartitioned)
    numbers = dimension_numbers(params)
    assert isinstance(numbers["dense"]["kernel"], MuonDimensionNumbers)
    assert readings(params, numbers) == {"dense/kernel": "5 matrices of 32 x 32"}


def test_layers_in_layers():
    shapes = {"layers": {"w": (5, 7, 6, 3), "experts": {"kernel": (4, 5, 7, 6, 3)}}}
    with pytest.raises(ValueError, match=r"layer_axes has .*'layers/w' of shape"):
        read(shapes, layer_axes={"layers": 0, "layers/experts": 0})
    shapes = {"layers": {"w": (7, 5, 6), "experts": {"kernel": (7, 5, 6, 4)}}}
    assert read(shapes, layer_axes={"layers": 1, "layers/experts": -1}) == {
        "layers/w": "5 matrices of 7 x 6",
        "layers/experts/kernel": "20 matrices of 7 x 6",
    }
    with pytest.raises(ValueError, match="layer_axes has \\['blocks'\\], but"):
        read(shapes, layer_axes={"blocks": 0})


def test_experts_beside_a_norm_that_is_not_stacked():
    class Experts(nn.Module):
        name_of_experts: str | None

        @nn.compact
        def __call__(self, x):
            experts = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
            )
            return experts(7, name=self.name_of_experts)(nn.LayerNorm()(x))

    for name in ("experts", None):
        params = linen_params(Experts(name), jnp.ones((3, 2, 6)))
        with pytest.raises(ValueError, match=f"'{name or 'VmapDense_0'}/bias' of shape"):
            dimension_numbers(params)


@pytest.mark.parametrize("out_axes", [1, -1])
def test_nnx_layers_stacked_along_another_axis(out_axes):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(3, 6, rngs=rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(out_axes=out_axes)
    def make(rngs):
        return Block(rngs)

    names = [f"attention/{name}" for name in ATTENTION]
    assert nnx_readings(nnx.eval_shape(lambda: make(nnx.Rngs(0)))) == {
        "linear/kernel": "3 matrices of 6 x 4",
        "linear/bias": "3 vectors of 4",
        **{f"{name}/kernel": "3 matrices of 6 x 6" for name in names},
        **{f"{name}/bias": "3 vectors of 6" for name in names},
    }


def test_nnx_layers_whose_sizes_do_not_tell_the_layer_axis():
    @nnx.split_rngs(splits=6)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(6, 6, rngs=rngs)

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"'bias' of shape \(6, 6\)"):
        dimension_numbers(model)
    assert readings(nnx.state(model), dimension_numbers(model, layer_axes={"": 0})) == {
        "kernel": "6 matrices of 6 x 6",
        "bias": "6 vectors of 6",
    }
    init = nnx.with_partitioning(nnx.initializers.ones_init(), ("embed", "mlp"))

    @nnx.split_rngs(splits=6)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make_partitioned(rngs):
        return nnx.Linear(6, 6, use_bias=False, kernel_init=init, rngs=rngs)

    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: make_partitioned(nnx.Rngs(0)))
    assert dimension_numbers(model)["kernel"] == MuonDimensionNumbers((1,), (2,))


def test_nnx_parameter_beside_stacked_experts():
    class Experts(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(6, 4, rngs=rngs))
            self.experts = nnx.split_rngs(splits=3)(make)(rngs)
            self.router = nnx.Param(jnp.ones((3, 6)))

    model = nnx.eval_shape(lambda: Experts(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'router' of shape \\(3, 6\\)"):
        dimension_numbers(model)
    numbers = dimension_numbers(model, layer_axes={"experts": 0})
    assert readings(nnx.state(model), numbers) == {
        "experts/kernel": "3 matrices of 6 x 4",
        "experts/bias": "3 vectors of 4",
        "router": "1 matrix of 3 x 6",
    }


def test_linen_modules_in_nnx():
    def bridged(module, *inputs):
        return nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), *inputs)

    model = bridged(nn.MultiHeadDotProductAttention(2), jnp.ones((1, 5, 6)))
    assert nnx_readings(model) == {
        **{f"{name}/kernel": "1 matrix of 6 x 6" for name in ATTENTION},
        **{f"{name}/bias": "1 vector of 6" for name in ATTENTION},
    }
    model = bridged(nn.Conv(8, (3,), feature_group_count=2), jnp.ones((1, 5, 4)))
    with pytest.raises(ValueError, match="'kernel' of shape \\(3, 2, 8\\)"):
        dimension_numbers(model)


class Kernel(nnx.Module):
    """A layer of another library."""

    def __init__(self, *shape, einsum_str=None):
        self.einsum_str = einsum_str
        self.kernel = nnx.Param(jnp.ones(shape))


class Einsums(nnx.Module):
    def __init__(self):
        self.query = Kernel(4, 16, 3, einsum_str="BTD,NDH->BTNH")
        self.experts = Kernel(5, 6, 7, einsum_str="etd, edf -> etf")


def test_nnx_modules_that_are_not_of_flax():
    assert nnx_readings(Einsums()) == {
        "query/kernel": "1 matrix of 16 x 12",
        "experts/kernel": "5 matrices of 6 x 7",
    }
    attention = nnx.Dict({n: Kernel(*((2, 3, 6) if n == "out" else (6, 2, 3))) for n in ATTENTION})
    assert set(nnx_readings(attention).values()) == {"1 matrix of 6 x 6"}
    attention = nnx.Dict({n: Kernel(16, 4, 4) for n in ATTENTION})
    with pytest.raises(ValueError, match="'key/kernel' of shape \\(16, 4, 4\\)"):
        dimension_numbers(attention)
    assert nnx_readings(nnx.Dict(a=nnx.Param(jnp.ones((6, 4))), b=nnx.Param(jnp.ones(4)))) == {
        "a": "1 matrix of 6 x 4",
        "b": "1 vector of 4",
    }


def test_a_grouped_convolution_is_an_error():
    model = nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"grouped convolution.*\(\(\), \(0, 1, 2\)\)"):
        dimension_numbers(model)
    overrides = {"kernel": MuonDimensionNumbers((), (0, 1, 2))}
    numbers = dimension_numbers(model, overrides=overrides)
    assert readings(nnx.state(model), numbers)["kernel"] == "8 vectors of 18"


def test_overrides():
    params = {"a": {"kernel": jnp.ones((2, 3, 4))}, "b": {"kernel": jnp.ones((2, 3))}}
    wanted = MuonDimensionNumbers((0, 1), 2)
    numbers = dimension_numbers(params, overrides={"a/*": wanted, "*/kernel": None})
    assert numbers == {"a": {"kernel": wanted}, "b": {"kernel": None}}
    with pytest.raises(
        ValueError, match=r"overrides has 'c/\*', which matches none of the leaves \['a/kernel'"
    ):
        dimension_numbers(params, overrides={"c/*": wanted})


def test_as_a_callable():
    model = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    assert readings(state, dimension_numbers) == readings(state, dimension_numbers(model))
    nnx.Optimizer(model, adamw2(0.1, weight_dimension_numbers=dimension_numbers), wrt=nnx.Param)
    conv = nnx.Conv(2, 3, (2,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"pass dimension_numbers\(model\)"):
        nnx.Optimizer(conv, adamw2(0.1, weight_dimension_numbers=dimension_numbers), wrt=nnx.Param)


@pytest.mark.parametrize("count", [jnp.zeros((), int), jnp.ones(3), 0])
def test_as_a_hyperparameter_is_an_error(count):
    with pytest.raises(ValueError, match="name weight_dimension_numbers in its static_args"):
        dimension_numbers(count)


def test_trees_with_holes():
    assert dimension_numbers({}) == {}
    assert dimension_numbers(None) is None
    params = {"a": optax.MaskedNode(), "b": None, "kernel": jnp.ones((2, 3))}
    numbers = MuonDimensionNumbers((0,), (1,))
    assert dimension_numbers(params) == {"a": optax.MaskedNode(), "b": None, "kernel": numbers}


def test_axes_are_counted_from_the_front():
    model = nnx.LinearGeneral(6, (2, 3), rngs=nnx.Rngs(0))
    numbers = dimension_numbers(model)
    assert numbers["kernel"] == MuonDimensionNumbers((0,), (1, 2))
    assert numbers["bias"] == MuonDimensionNumbers((), (0, 1))
