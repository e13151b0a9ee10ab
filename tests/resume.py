"""Runs that are saved half way, for tests/test_checkpoint.py; `python resume.py FOLDER` does their second half."""

import hashlib
import json
import pathlib
import sys

if __name__ == "__main__":
    import conftest

    conftest.simulate_devices()

import jax
import models
import numpy as np
import optax

import zerojax

STEPS = 3  # before the checkpoint, and after
DATA = {name: np.concatenate([batch[name] for batch in models.mlp_batches()]) for name in ("x", "y")}


def split_int8():
    return zerojax.master_weights(zerojax.fused_adamw(1e-2, mu_dtype="int8", nu_dtype="int8"))


def every_second():
    return optax.MultiSteps(
        models.clipped_adamw(), 2
    ).gradient_transformation()  # an odd number of steps ends amid an accumulation


CASES = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2, "accumulate": 2},
    "stage 3": {"stage": 3},
    "amid an accumulation": {"stage": 2, "tx": every_second},
    "float16": {"stage": 1, "dtype": "float16", "loss_scale": 2.0**17},  # overflows at first
    "int8 moments": {"stage": 2, "dtype": "bfloat16", "tx": split_int8},
    "offload": {"stage": 2, "tx": lambda: zerojax.fused_adamw(1e-2), "offload": "pinned_host"},
}


def build(case, *, stage, tx=models.clipped_adamw, dtype="float32", loss_scale=None, offload=None, accumulate=1):
    """Step, transformation, plan, loss scale and data of a case."""
    del case
    params = jax.tree.map(lambda x: x.astype(dtype), models.mlp_params())
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=stage, min_size=1, offload=offload)
    scale = None if loss_scale is None else zerojax.dynamic_loss_scale(initial=loss_scale, window=2, hysteresis=1)
    tx = zerojax.zero(tx(), plan)
    step = zerojax.make_train_step(models.mlp_loss, tx, plan, loss_scale=scale, accumulate=accumulate)
    loader = zerojax.Dataloader(DATA, plan.batch, rows=32, seed=1)
    return params, step, tx, plan, scale, loader


def go_on(step, state, loader):
    """Some steps: the state, and what there is to compare."""
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, loader.next_batch())
        losses.append(np.asarray(metrics["loss"]).tobytes().hex())
    digests = [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in jax.tree.leaves(state)]
    return state, {"losses": losses, "state": digests, "step": int(state.step), "skipped": int(state.skipped)}


def first_half(name, folder):
    """Trains, saves and goes on; what that came to."""
    params, step, tx, plan, scale, loader = build(name, **CASES[name])
    state = zerojax.create_train_state(params, tx, plan, loss_scale=scale)
    state, _ = go_on(step, state, loader)
    zerojax.save_checkpoint(folder, state, extra={"data": loader.state()}, wait=False)
    return go_on(step, state, loader)[1]


def second_half(name, folder):
    """What going on from the checkpoint came to."""
    _, step, tx, plan, _, loader = build(name, **CASES[name])
    state, extra = zerojax.restore_checkpoint(folder, tx, plan)
    loader.restore(extra["data"])
    return go_on(step, state, loader)[1]


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    print(json.dumps({name: second_half(name, folder / name) for name in CASES}))
