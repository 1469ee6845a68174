"""What an update of GPT-2 small moves between devices, at its real widths, compiled only.

For devices of a CPU, whose compiler puts few of the sums of different leaves into one operation,
and which solves the small problem of one matrix at a time, gathered. A TPU's needs a sixth of them.
"""

import jax
import pytest

from benchmarks import peers, sharding, trees

MOST = {"fsdp-8": 18, "tensor-8": 18, "data-4-tensor-2": 30, "layers-4": 24}


def moved_by_adamw2(tree, layout):
    """What an update of a tree moves, in a layout."""
    params = sharding.place(tree.shapes, sharding.LAYOUTS[layout], jax.devices())
    solver = peers.OPTIMIZERS["adamw2"](tree.numbers)
    state = sharding.placed_state(solver, params)
    return sharding.collectives(sharding.compile_update(solver, params, state).as_text())


@pytest.mark.slow
@pytest.mark.parametrize("layout", MOST)
def test_few_collectives_and_no_weight_moves(layout):
    tree = sharding.gpt2("gpt2-small")
    moved = moved_by_adamw2(tree, layout)
    assert len(moved) <= MOST[layout]
    smallest = 12 * 768 * 768  # entries of a stack of weights
    assert sharding.largest(moved) < smallest / 20


@pytest.mark.slow
def test_layers_apart_move_no_weight_either():
    tree = trees.unstacked(sharding.gpt2("gpt2-small", num_layers=4))
    assert sharding.largest(moved_by_adamw2(tree, "fsdp-8")) < 768 * 768 / 4


def test_collectives_of_a_program():
    program = """
  %all-gather.1 = f32[12,8,768]{1,0,2} all-gather(%x), channel_id=8, dimensions={2}
  %all-reduce = (f32[9,9]{1,0}, bf16[12]{0}, /*index=5*/f32[]) all-reduce(%a, %b), to_apply=%add
  %p = (f32[8], f32[8]) collective-permute-start(%y), channel_id=2
  %f = f32[8] fusion(%all-reduce), calls=%c
  %all-gather.2 = f32[12,8,768]{1,0,2} all-gather(%z), channel_id=8, dimensions={2}
"""
    assert sharding.collectives(program) == [
        sharding.Collective("all-gather", (12 * 8 * 768,), 12 * 8 * 768 * 4),
        sharding.Collective("all-reduce", (9 * 9, 12, 1), 9 * 9 * 4 + 24 + 4),
        sharding.Collective("collective-permute", (8, 8), 64),
    ]
    assert sharding.largest(sharding.collectives(program)) == 12 * 8 * 768
