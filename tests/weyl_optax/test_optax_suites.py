"""The tests that Optax has for its own optimizers, as the installed Optax ships them, on ours."""

import inspect
import itertools
import warnings
from collections.abc import Callable

import jax.numpy as jnp
import optax
import pytest

import weyl_optax
from weyl_optax import contrib

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the optimizers that these files make when they are read
    from optax._src import sharding_test
    from optax.contrib import _common_test


def bounded_sgd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """`scale_by_weyl_bound` behind a whole optimizer."""
    return optax.chain(optax.sgd(learning_rate), weyl_optax.scale_by_weyl_bound())


def behind_adam(transform: Callable[[], optax.GradientTransformation]) -> Callable:
    return lambda learning_rate: optax.chain(optax.adam(learning_rate), transform())


def noise_share(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return contrib.scale_by_noise_share(optax.adam(learning_rate))


FACTORIES = {
    "adamw2": (weyl_optax.adamw2, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    "bounded_sgd": (bounded_sgd, {"learning_rate": 1e-2}),
    "gi_adamw": (contrib.gi_adamw, {"learning_rate": 1e-2, "b2": 0.9, "weight_decay": 0.0}),
    "lion_a": (contrib.lion_a, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    "soft_clip": (behind_adam(lambda: contrib.soft_spectral_clip(1.0)), {"learning_rate": 1e-2}),
}
# What goes to no minimum by itself: weights on spheres, and gradients without noise.
CONSTRAINED = {
    "lion_ar": (contrib.lion_ar, {"learning_rate": 1e-2}),
    "keep_norm": (behind_adam(contrib.keep_norm), {"learning_rate": 1e-2}),
    "rotate": (behind_adam(lambda: contrib.rotate(0.01)), {"learning_rate": 1e-2}),
    "noise_share": (noise_share, {"learning_rate": 1e-2}),
}


def originals(case):
    """The test methods of a class of Optax, as they were before they got their parameters."""
    methods = [getattr(case, name) for name in dir(case) if name.startswith("test")]
    found = {method.__wrapped__.__name__: method.__wrapped__ for method in methods}
    assert found
    return found


COMMON = originals(_common_test.ContribTest)
# The values of the parameters that are not the optimizer's.
VALUES = {
    "wrapper_name": [None],
    "wrapper_kwargs": [None],
    "wrap": [True, False],
    "target": [
        _common_test._setup_parabola,
        _common_test._setup_rosenbrock,
        _common_test._setup_matrix_parabola,
        _common_test._setup_mixed_tensor_target,
    ],
}
DTYPES = {
    "test_optimizers": ["float32"],
    "test_preserve_dtype": ["bfloat16", "float32"],
    "test_gradient_accumulation": ["bfloat16", "float32"],
    "test_state_shape_dtype_shard_stability": [
        jnp.float16,
        jnp.bfloat16,
        jnp.float32,
        jnp.float64,
    ],
}


def cases():
    for name, test in COMMON.items():
        parameters = [p for p in inspect.signature(test).parameters if p in (*VALUES, "dtype")]
        values = [DTYPES[name] if p == "dtype" else VALUES[p] for p in parameters]
        for combination in itertools.product(*values):
            arguments = dict(zip(parameters, combination, strict=True))
            shown = [getattr(x, "__name__", str(x)) for x in combination if x is not None]
            yield pytest.param(name, arguments, id="-".join([name, *shown]))


def optimizer_cases():
    for optimizer in FACTORIES | CONSTRAINED:
        for case in cases():
            if optimizer in FACTORIES or case.values[0] != "test_optimizers":
                yield pytest.param(optimizer, *case.values, id=f"{optimizer}-{case.id}")


@pytest.mark.parametrize(("optimizer", "name", "arguments"), [*optimizer_cases()])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_common(monkeypatch, optimizer, name, arguments):
    factory, settings = (FACTORIES | CONSTRAINED)[optimizer]
    monkeypatch.setattr(optax.contrib, optimizer, factory, raising=False)
    if arguments.get("target") is _common_test._setup_rosenbrock and optimizer == "bounded_sgd":
        settings = {"learning_rate": 1e-3}  # plain SGD diverges above
    case = _common_test.ContribTest(methodName="run")
    COMMON[name](case, opt_name=optimizer, opt_kwargs=settings, **arguments)


SHARDING = {
    name: test
    for name, test in originals(sharding_test.ShardingTest).items()
    if "optimizer" in inspect.signature(test).parameters
}


@pytest.mark.parametrize("optimizer", FACTORIES | CONSTRAINED)
@pytest.mark.parametrize("name", SHARDING)
def test_sharding(monkeypatch, optimizer, name):
    # They compare versions as strings, and would skip themselves from JAX 0.10 on.
    monkeypatch.setattr(sharding_test.jax, "__version__", "0.9.9")
    factory, settings = (FACTORIES | CONSTRAINED)[optimizer]
    SHARDING[name](sharding_test.ShardingTest(methodName="run"), optimizer=factory(**settings))
