"""Random programs, whose right reading is known from how they were made.

A leaf is drawn with a role for each of its axes. Steps that leave the roles as they are follow:
layout, arithmetic, masks, products with constants and with other weights. Then the leaf meets the
data as its roles say, and the result goes on through a network.
"""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from weyl_optax import dimension_numbers_from

REDUCTION, OUTPUT, BATCH, ENTRY, ROW = "reduction", "output", "batch", "entry", "row"


class Program:
    """A random loss: a list of functions, to be applied to a weight one after another."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.params, self.inputs, self.right = {}, [], {}
        self.steps, self.log = [], []
        kind = self.random.choice(["product", "product", "product", "entries", "rows"])
        self.roles = self.draw_roles(kind)
        self.shape = [int(self.random.choice([2, 3, 4, 6])) for _ in self.roles]
        self.original = list(self.roles)
        self.params["w"] = tuple(self.shape)
        self.is_mixed = False  # other weights have summed an axis
        self.is_masked = False
        self.is_added = False  # data has been added, so that what is not linear is an activation
        for _ in range(self.random.integers(0, 7)):
            step = self.random.choice(STEPS)
            if self.is_added and step in NOT_LINEAR:
                continue
            before = len(self.steps)
            step(self)
            if len(self.steps) > before:
                self.log.append(step.__name__)
        getattr(self, kind)()
        self.log.append(kind)
        self.right["w"] = self.reading()

    def draw_roles(self, kind):
        if kind == "entries":
            return [ENTRY] * self.random.integers(2, 5)
        if kind == "rows":
            roles = [ROW] + [OUTPUT] * self.random.integers(1, 3)
        else:
            roles = [REDUCTION] * self.random.integers(1, 3)
            roles += [OUTPUT] * self.random.integers(1, 3) + [BATCH] * self.random.integers(0, 2)
        return [roles[i] for i in self.random.permutation(len(roles))]

    def reading(self):
        def axes(*roles):
            return frozenset(i for i, role in enumerate(self.original) if role in roles)

        return {side for side in (axes(REDUCTION, ROW), axes(OUTPUT, ENTRY)) if side}

    # What is drawn.

    def axis(self, *roles):
        """An axis of some role, or None."""
        axes = [i for i, role in enumerate(self.roles) if role in roles or not roles]
        return int(self.random.choice(axes)) if axes else None

    def chance(self, share=0.5):
        return self.random.random() < share

    def leaf(self, shape, right):
        """Another leaf, and its right reading."""
        name = f"leaf{len(self.params)}"
        self.params[name], self.right[name] = tuple(shape), right
        return name

    def input(self, shape, dtype=jnp.float32):
        """An input, and its place."""
        self.inputs.append(jax.ShapeDtypeStruct(tuple(shape), dtype))
        return len(self.inputs) - 1

    def constant(self, *shape):
        return np.asarray(self.random.normal(size=shape), np.float32)

    def add(self, fn):
        self.steps.append(fn)

    # How the leaf meets the data.

    def product(self):
        letters = dict(enumerate(string.ascii_lowercase[: len(self.roles)]))
        named = [letters[i] for i, role in enumerate(self.roles) if role in (REDUCTION, BATCH)]
        sizes = {"z": 5} | {letters[i]: size for i, size in enumerate(self.shape)}
        named = ["z", *(named[i] for i in self.random.permutation(len(named)))]
        out = [letters[i] for i, role in enumerate(self.roles) if role != REDUCTION]
        out = ["z", *(out[i] for i in self.random.permutation(len(out)))]
        x = self.input([sizes[letter] for letter in named])
        mine, of_x = "".join(letters.values()), "".join(named)
        if self.chance(0.2):  # a weight of each sample
            mine = "z" + mine
            mask, self.is_added = self.input([5, *self.shape]), True
            self.add(lambda w, p, a: w * a[mask])
            self.log.append("of each sample")
        if self.chance(0.2) and not (self.is_added or self.is_masked):  # by hand
            every = [*"z", *letters.values()]
            summed = tuple(i for i, c in enumerate(every) if c not in out)

            def by_hand(w, p, a):
                data = jnp.einsum(f"{of_x}->{''.join(c for c in every if c in named)}", a[x])
                shape = [n if c in named else 1 for c, n in sizes.items()]
                data = data.reshape(shape)
                return (data * w).sum(summed)

            self.log.append("by hand")
            self.add(by_hand)
        else:
            swap, result = self.chance(), "".join(out)

            def contract(w, p, a):
                if swap:
                    return jnp.einsum(f"{of_x},{mine}->{result}", a[x], w)
                return jnp.einsum(f"{mine},{of_x}->{result}", w, a[x])

            self.add(contract)

    def entries(self):
        x = self.input([5, *self.shape])
        adds = self.chance(0.7)
        self.add(lambda w, p, a: a[x] + w if adds else w * a[x])

    def rows(self):
        if ROW not in self.roles:
            return
        t, axis = self.input([5, 2], jnp.int32), self.roles.index(ROW)
        if self.chance(0.7):
            self.add(lambda w, p, a: jnp.take(w, a[t], axis=axis))
        else:
            size = self.shape[axis]
            self.add(lambda w, p, a: jnp.tensordot(jax.nn.one_hot(a[t], size), w, ((2,), (axis,))))

    def __call__(self, params, *inputs):
        w = params["w"]
        for step in self.steps:
            w = step(w, params, inputs)
        return w

    def loss(self):
        """With what follows in a network."""
        tail = self.random.integers(5)
        penalty = self.chance(0.2)
        anchor = self.input(self.params["w"]) if penalty else None
        scale = self.leaf((), set())
        self.log.append(f"tail {tail}, penalty {penalty}")

        def fn(params, *inputs):
            y = self(params, *inputs)
            y = y.reshape(y.shape[0], -1) * params[scale]
            if tail == 1:
                y = jnp.tanh(y)
            elif tail == 2:
                y = jax.nn.relu(y) @ np.ones((y.shape[1], 3), np.float32)
            elif tail == 3:
                y = jax.nn.softmax(y - y.mean(-1, keepdims=True))
            loss = y if tail == 4 else jnp.mean(y**2)
            if penalty:
                loss += jnp.sum((params["w"] - inputs[anchor]) ** 2)
            return loss

        return fn


def arithmetic(program):
    fn = program.random.choice([jnp.tanh, jnp.negative, lambda w: 2 * w + 1, jnp.abs, jnp.exp])
    program.add(lambda w, p, a: fn(w))


def transpose(program):
    order = [int(i) for i in program.random.permutation(len(program.shape))]
    program.add(lambda w, p, a: w.transpose(order))
    program.shape = [program.shape[i] for i in order]
    program.roles = [program.roles[i] for i in order]


def flip_and_roll(program):
    axis = program.axis()
    program.add(lambda w, p, a: jnp.roll(jnp.flip(w, axis), 1, axis))


def slice_axis(program):
    axis = program.axis()
    size = program.shape[axis]
    if (size > 2 and program.original == program.roles) or size > 3:
        program.add(lambda w, p, a: lax.slice_in_dim(w, 0, size - 1, axis=axis))
        program.shape[axis] = size - 1


def pad_axis(program):
    axis = program.axis()
    widths = [(0, 2 * (i == axis)) for i in range(len(program.shape))]
    program.add(lambda w, p, a: jnp.pad(w, widths))
    program.shape[axis] += 2


def repeat_axis(program):
    axis = program.axis()
    program.add(lambda w, p, a: jnp.repeat(w, 2, axis))
    program.shape[axis] *= 2


def concatenate(program):
    axis = program.axis()
    program.add(lambda w, p, a: jnp.concatenate([w, -w], axis))
    program.shape[axis] *= 2


def split_axis(program):
    axis = program.axis()
    size = program.shape[axis]
    if size % 2 == 0 and size > 2:
        parts = [2, size // 2] if program.chance() else [size // 2, 2]
        shape = [*program.shape[:axis], *parts, *program.shape[axis + 1 :]]
        if program.roles[axis] in (BATCH, ROW) or len(shape) > 5:
            return
        program.add(lambda w, p, a: w.reshape(shape))
        program.shape = list(shape)
        program.roles.insert(axis, program.roles[axis])


def merge_axes(program):
    axis = program.axis()
    if axis + 1 < len(program.shape) and program.roles[axis] == program.roles[axis + 1]:
        size = program.shape[axis] * program.shape[axis + 1]
        shape = [*program.shape[:axis], size, *program.shape[axis + 2 :]]
        program.add(lambda w, p, a: w.reshape(shape))
        program.shape = list(shape)
        del program.roles[axis]


def index_batch(program):
    axis = program.axis(BATCH)
    if axis is not None and len(program.shape) > 2:
        program.add(lambda w, p, a: jnp.take(w, 1, axis=axis))
        del program.shape[axis], program.roles[axis]


def constant_mask(program):
    mask = program.constant(*program.shape)
    program.add(lambda w, p, a: jnp.where(mask > 0, w, 0) * mask)


def constant_product(program):
    axis = program.axis()
    size = int(program.random.integers(2, 5))
    basis = program.constant(program.shape[axis], size)
    program.add(lambda w, p, a: jnp.moveaxis(jnp.tensordot(w, basis, ((axis,), (0,))), -1, axis))
    program.shape[axis] = size


def weight_mask(program):
    """Two matrices, entry by entry: the other is read as the roles say too."""
    shape = [n if program.chance(0.7) else 1 for n in program.shape]
    roles = {role: set() for role in (REDUCTION, OUTPUT, BATCH, ENTRY, ROW)}
    for i, role in enumerate(program.roles):
        if shape[i] > 1:
            roles[role].add(i)
    right = [frozenset(roles[REDUCTION] | roles[ROW]), frozenset(roles[OUTPUT] | roles[ENTRY])]
    if roles[ROW] and not roles[OUTPUT]:
        return
    name = program.leaf(shape, {side for side in right if side})
    program.add(lambda w, p, a: w * p[name])


def gain(program):
    axis = program.axis()
    name = program.leaf([program.shape[axis]], {frozenset([0])})
    shape = [-1 if i == axis else 1 for i in range(len(program.shape))]
    program.add(lambda w, p, a: w * (1 + p[name].reshape(shape)))


def low_rank(program):
    """A product with other weights in place of the only axis of a role."""
    axis = program.axis(REDUCTION, OUTPUT)
    if program.is_mixed or axis is None or program.original.count(program.roles[axis]) > 1:
        return
    if program.roles.count(program.roles[axis]) > 1 or ROW in program.roles:
        return
    size = program.shape[axis]
    name = program.leaf([size, 3], {frozenset([0]), frozenset([1])})
    program.add(lambda w, p, a: jnp.moveaxis(jnp.tensordot(w, p[name], ((axis,), (0,))), -1, axis))
    program.shape[axis], program.is_mixed = 3, True


def data_mask(program):
    if ENTRY in program.roles:
        return
    mask = program.input(program.shape)
    if program.chance(0.3):
        program.add(lambda w, p, a: w + a[mask])
        program.is_added = True
    else:
        program.add(lambda w, p, a: w * a[mask])
        program.is_masked = True


def data_scale(program):
    s = program.input(())
    program.add(lambda w, p, a: w * a[s])


def noise(program):
    key = program.input((2,), jnp.uint32)
    program.add(lambda w, p, a: w + jax.random.normal(a[key], w.shape))


def standardize(program):
    axis = program.axis()
    if BATCH not in program.roles[axis]:
        program.add(lambda w, p, a: (w - w.mean(axis, keepdims=True)) / w.std(axis, keepdims=True))


def normalize(program):
    program.add(lambda w, p, a: w / jnp.sqrt(jnp.sum(w**2)))


def call(program):
    wrap = program.random.choice([jax.jit, jax.checkpoint])
    program.add(lambda w, p, a: wrap(jnp.sin)(w))


def branch(program):
    program.add(lambda w, p, a: lax.cond(w.sum() > 0, lambda: w, lambda: 2 * w))


def loop(program):
    program.add(lambda w, p, a: lax.fori_loop(0, 3, lambda _, w: w * 0.5, w))


STEPS = [
    arithmetic,
    transpose,
    flip_and_roll,
    slice_axis,
    pad_axis,
    repeat_axis,
    concatenate,
    split_axis,
    merge_axes,
    index_batch,
    constant_mask,
    constant_product,
    weight_mask,
    gain,
    low_rank,
    data_mask,
    data_scale,
    noise,
    standardize,
    normalize,
    call,
    branch,
    loop,
]


NOT_LINEAR = [arithmetic, standardize, normalize, call, branch, low_rank]


def sides(shape, numbers):
    wide = [frozenset(i for i in side if shape[i] > 1) for side in numbers]
    return {side for side in wide if side}


def check(seed):
    program = Program(seed)
    fn = program.loss()
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in program.params.items()
    }
    numbers = dimension_numbers_from(fn, params, *program.inputs)
    for name, right in program.right.items():
        read = sides(program.params[name], numbers[name])
        if len(right) < 2:  # a vector, or one for each index of batch axes
            assert not numbers[name].reduction_axis
            read, right = frozenset().union(*right) <= frozenset().union(*read), True
        assert read == right, (
            f"{seed} {name} {program.params} {program.log} {numbers[name]} {right}"
        )


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_random_programs(start):
    for seed in range(start, start + 50):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(300, 5300, 500))
def test_many_random_programs(start):
    for seed in range(start, start + 500):
        check(seed)
