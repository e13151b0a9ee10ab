"""The compiled program holds the collectives and the bytes that the plan announces, and no others."""

import functools
import math
import re

import jax
import models
import pytest

import zerojax
from zerojax import report


@functools.cache
def compiled(stage, accumulate=1):
    params = models.mlp_params()
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=stage, min_size=64)
    tx = zerojax.zero(models.clipped_adamw(), plan)
    state = zerojax.create_train_state(params, tx, plan)
    step = zerojax.make_train_step(models.mlp_loss, tx, plan, accumulate=accumulate)
    return plan, step.lower(state, models.mlp_batches()[0]).compile()


def inside_loops(hlo, name):
    """How many operations `name` stand outside the program's entry, in the bodies of its loops."""
    entry = hlo[hlo.index("ENTRY") :]
    return report.collectives(hlo).get(name, 0) - report.collectives(entry).get(name, 0)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_stage_0_all_reduces_alone(accumulate):
    assert report.collectives(compiled(0, accumulate)[1].as_text()).keys() == {"all-reduce"}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_gradients_are_never_all_reduced(stage, accumulate):
    plan, program = compiled(stage, accumulate)
    hlo = program.as_text()
    found = report.collectives(hlo)
    sharded = [leaf for leaf in plan.leaves if leaf.dim is not None]
    assert found["reduce-scatter"] == found["all-gather"] == len(sharded)
    assert found.keys() == {"reduce-scatter", "all-gather", "all-reduce"}
    # What is all-reduced: the gradients of leaves that stay whole, the loss, the norm, and two of Optax's own norms.
    elements = sum(math.prod(leaf.shape) for leaf in plan.unsharded())
    assert sum(report.result_bytes(hlo, "all-reduce")) <= 4 * (elements + 16)


def test_stage_2_scatters_each_micro_batch_and_stage_1_their_sum():
    for stage, expected in ((1, 0), (2, 3), (3, 3)):
        assert inside_loops(compiled(stage, 4)[1].as_text(), "reduce-scatter") == expected
    for stage in (1, 2, 3):
        assert inside_loops(compiled(stage, 4)[1].as_text(), "all-gather") == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_is_updated_in_place_and_holds_what_was_planned(stage):
    plan, program = compiled(stage)
    memory = plan.memory(models.clipped_adamw())
    held = program.memory_analysis()
    batch = 32 // 8 * (16 + 8) * 4
    counters = 4 * 2  # step and skipped
    assert held.argument_size_in_bytes == memory.params + memory.opt_state + batch + counters
    assert held.alias_size_in_bytes == memory.params + memory.opt_state + counters


def test_stage_3_gathers_one_layer_at_a_time():
    params = models.stack_params(layers=6, width=16)
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=3, min_size=64)
    tx = zerojax.zero(models.clipped_adamw(), plan)
    state = zerojax.create_train_state(params, tx, plan)
    loss_fn = functools.partial(models.stack_loss, gather=zerojax.gather)
    step = zerojax.make_train_step(loss_fn, tx, plan, layerwise="^layers/")
    hlo = step.lower(state, models.mlp_batches()[0]).compile().as_text()
    assert "all-to-all" not in hlo
    one_layer = sum(x.nbytes for x in jax.tree.leaves(params["layers"])) // 6
    assert max(report.result_bytes(hlo, "all-gather")) == one_layer
    assert inside_loops(hlo, "all-gather") == 2  # a layer's leaves together, forward and backward
    assert inside_loops(hlo, "reduce-scatter") == 1


def test_gradients_are_reduced_in_grad_dtype():
    params = models.mlp_params()
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=2, min_size=64)
    tx = zerojax.zero(models.clipped_adamw(), plan)
    state = zerojax.create_train_state(params, tx, plan)
    step = zerojax.make_train_step(models.mlp_loss, tx, plan, grad_dtype="bfloat16")
    lowered = step.lower(state, models.mlp_batches()[0]).as_text()
    scatters = re.findall(r"stablehlo.reduce_scatter.*?\}\) : \(tensor<([^>]*)>", lowered, re.DOTALL)
    assert len(scatters) == 3 and all(s.endswith("xbf16") for s in scatters)
    _, metrics = step(state, models.mlp_batches()[0])
    losses, norms, _ = models.reference(models.mlp_params, models.mlp_loss)
    assert float(metrics["loss"]) == pytest.approx(losses[0], rel=2e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norms[0], rel=2**-7)  # each of 8 terms rounded to 8 bits
    assert all(x.dtype == "float32" for x in jax.tree.leaves(state.params))
