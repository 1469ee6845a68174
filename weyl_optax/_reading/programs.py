"""What the equations of a program are made of."""

from collections.abc import Iterable
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# One output for each operand, entry by entry the same.
IDENTITIES = frozenset(
    "convert_element_type copy copy_p device_put layout_constraint mesh_cast name "
    "optimization_barrier pvary reduce_precision reshard sharding_constraint "
    "stop_gradient".split()
)


def body_of(eqn: JaxprEqn) -> Jaxpr | None:
    """The program that an equation calls with its operands, as `jit` and `remat` do."""
    for param in eqn.params.values():
        body = param.jaxpr if isinstance(param, ClosedJaxpr) else param
        if isinstance(body, Jaxpr):
            inside, outside = shapes_of(body.invars), shapes_of(eqn.invars)
            if list(map(len, inside)) == list(map(len, outside)):
                return body
    return None


def shapes_of(atoms: Iterable[Any]) -> list[tuple[int, ...]]:
    """The shapes of operands, or of outputs."""
    return [getattr(atom.aval, "shape", ()) for atom in atoms]
