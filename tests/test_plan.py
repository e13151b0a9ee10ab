"""The plan is arithmetic on shapes: what is cut along which dim, what stays whole and why, and what it costs."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import zerojax

P = PartitionSpec
GB = 10**9


def planned_mesh(*sizes, names=("data",), axis_type=models.AUTO):
    """A mesh without devices."""
    return AbstractMesh(sizes, names, axis_types=(axis_type,) * len(sizes))


def leaf(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def spec_of(shape, devices=8, min_size=1, stage=3, **options):
    plan = zerojax.make_plan({"w": leaf(*shape)}, planned_mesh(devices), stage=stage, min_size=min_size, **options)
    return plan.params["w"].spec


def reasons(plan):
    return {leaf.name: leaf.reason for leaf in plan.unsharded()}


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), P()),
        ((0,), P()),
        ((0, 8), P()),  # a dim that divides, but nothing to cut
        ((1,), P()),
        ((7,), P()),
        ((8,), P("data")),
        ((12,), P()),
        ((4, 2), P()),  # eight elements, but no dim of eight
        ((7, 13), P()),
        ((7, 16, 11), P(None, "data", None)),
        ((10007, 8), P(None, "data")),  # the largest dim is prime
        ((16, 24), P(None, "data")),
        ((24, 16), P("data", None)),
        ((20, 16), P(None, "data")),  # the largest dim does not divide
        ((16, 16), P(None, "data")),  # of equal dims the leading one last: it may count layers
        ((16, 16, 16), P(None, "data", None)),  # of the others the first
        ((48, 16, 48), P(None, None, "data")),
        ((48, 16, 16), P("data", None, None)),  # only where it is larger than all others is the leading dim cut
        ((8, 1, 1, 8), P(None, None, None, "data")),
    ],
)
def test_the_dim_that_is_cut(shape, spec):
    assert spec_of(shape) == spec


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 8])
def test_one_dim_is_cut_and_it_divides(devices):
    """The rule itself, over many shapes: a cut dim is a multiple of the devices, and no larger one is."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(int(n) for n in rng.integers(0, 31, size=rng.integers(0, 5)))
        spec = spec_of(shape, devices)
        cut = [d for d, entry in enumerate(spec) if entry == "data"]
        dividing = [n for n in shape if 0 not in shape and n % devices == 0]
        if not dividing:
            assert spec == P(), shape
        else:
            assert len(cut) == 1, shape
            assert shape[cut[0]] == max(dividing), shape


def test_a_stack_of_layers_keeps_its_layers_whole():
    # 32 layers of width 32 tie; 96 layers are more than the width, and there is nothing better to cut.
    assert spec_of((32, 32)) == P(None, "data")
    assert spec_of((32, 32, 8)) == P(None, "data", None)
    assert spec_of((32, 8, 32)) == P(None, None, "data")
    assert spec_of((96, 32, 32)) == P("data", None, None)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_each_stage_cuts(stage):
    params = {"w": leaf(16, 24), "b": leaf(7)}
    plan = zerojax.make_plan(params, planned_mesh(8), stage=stage, min_size=1)
    cut, whole = P(None, "data"), P()
    assert plan.params["w"].spec == (cut if stage >= 3 else whole)
    assert plan.grads["w"].spec == (cut if stage >= 2 else whole)
    state = plan.opt_state(optax.adam(1e-3))[0]
    assert state.mu["w"].spec == state.nu["w"].spec == (cut if stage >= 1 else whole)
    assert {x.spec for x in (plan.params["b"], plan.grads["b"], state.mu["b"], state.count)} == {whole}
    assert jax.tree.structure(plan.params) == jax.tree.structure(plan.grads) == jax.tree.structure(params)


def test_hundreds_of_tiny_leaves():
    params = {f"layer{i}": {"scale": leaf(3), "bias": leaf(i % 5)} for i in range(300)} | {"w": leaf(128, 256)}
    plan = zerojax.make_plan(params, planned_mesh(8), stage=3)
    assert [f.name for f in plan.leaves if f.dim is not None] == ["w"]
    assert len(reasons(plan)) == 600
    tiny = sum(4 * (3 + i % 5) for i in range(300))
    assert plan.memory(optax.sgd(0.1)).params == tiny + 128 * 256 * 4 // 8


def test_numbers_arrays_and_shapes_plan_alike():
    """Only shapes and dtypes are read, so what holds them does not matter."""
    arrays = {"w": np.ones((16, 24), np.float32), "g": 1.5, "n": jnp.ones((8,), jnp.bfloat16)}
    shapes = {"w": leaf(16, 24), "g": leaf(), "n": leaf(8, dtype="bfloat16")}
    plans = [zerojax.make_plan(x, planned_mesh(8), stage=3, min_size=1) for x in (arrays, shapes)]
    assert plans[0].leaves == plans[1].leaves
    assert plans[0].shapes == shapes


def test_a_param_that_is_the_whole_tree():
    plan = zerojax.make_plan(leaf(16, 24), planned_mesh(8), stage=3, min_size=1)
    assert plan.params.spec == plan.opt_state(optax.adam(1e-3))[0].mu.spec == P(None, "data")
    assert plan.leaves[0].name == "(root)"


def test_no_params_at_all():
    plan = zerojax.make_plan({}, planned_mesh(8), stage=3)
    assert plan.params == {}
    assert plan.memory(optax.adam(1e-3)).total == 4  # Adam's count


def test_a_param_that_is_none_is_no_leaf():
    """Layers without a bias often say None, in Optax too."""
    plan = zerojax.make_plan({"w": leaf(16, 24), "bias": None}, planned_mesh(8), stage=3, min_size=1)
    assert plan.params["w"].spec == P(None, "data")
    assert plan.params["bias"] is None
    specs = {"w": P("model"), "bias": None}
    mesh = planned_mesh(4, 2, names=("data", "model"))
    plan = zerojax.make_plan({"w": leaf(16, 24), "bias": None}, mesh, stage=3, min_size=1, param_specs=specs)
    assert plan.params["w"].spec == P("model", "data")


# Several axes taken as one.


def test_several_axes_as_one():
    mesh = planned_mesh(2, 4, names=("replica", "fsdp"))
    params = {"w": leaf(24, 16), "small": leaf(4, 4)}
    both = zerojax.make_plan(params, mesh, stage=3, axis=("replica", "fsdp"), min_size=1)
    assert both.num_shards == 8
    assert both.params["w"].spec == P(("replica", "fsdp"), None)
    assert both.batch.spec == P(("replica", "fsdp"))
    assert reasons(both) == {"small": "no free dim is a multiple of 8"}  # 2 x 4 shards want eight, not four
    one = zerojax.make_plan(params, mesh, stage=3, axis="fsdp", min_size=1)
    assert one.num_shards == 4
    assert one.params["w"].spec == P("fsdp", None)
    assert reasons(one) == {}
    assert zerojax.make_plan(params, mesh, stage=3, axis=("fsdp",), min_size=1).leaves == one.leaves
    swapped = zerojax.make_plan(params, mesh, stage=3, axis=("fsdp", "replica"), min_size=1)
    assert swapped.params["w"].spec == P(("fsdp", "replica"), None)


# Dims already taken, by tensor parallelism.


@pytest.mark.parametrize(
    ("shape", "taken", "spec"),
    [
        ((16, 32), None, P(None, "data")),
        ((16, 32), P(), P(None, "data")),
        ((16, 32), P(None, "model"), P("data", "model")),  # the larger dim is taken
        ((16, 32), P("model"), P("model", "data")),
        ((16, 32), P("model", None), P("model", "data")),
        ((7, 32), P(None, "model"), P(None, "model")),  # nothing free divides: as it was
        ((16, 32), P("model", "more"), P("model", "more")),
        ((16, 32), P(None, ("model", "more")), P("data", ("model", "more"))),
        ((32, 16, 16), P("model"), P("model", "data", None)),
    ],
)
def test_zero_takes_a_free_dim(shape, taken, spec):
    mesh = planned_mesh(4, 2, 2, names=("data", "model", "more"))
    plan = zerojax.make_plan({"w": leaf(*shape)}, mesh, stage=3, param_specs={"w": taken}, min_size=1)
    assert plan.params["w"].spec == spec
    below = zerojax.make_plan({"w": leaf(*shape)}, mesh, stage=2, param_specs={"w": taken}, min_size=1)
    assert below.params["w"].spec == (P() if taken is None else taken)  # what was taken is kept at every stage
    assert below.grads["w"].spec == spec


def test_param_specs_is_a_prefix_of_params():
    mesh = planned_mesh(4, 2, names=("data", "model"))
    params = {"attention": {"q": leaf(16, 32), "k": leaf(16, 32)}, "norm": leaf(32)}
    make = lambda specs: zerojax.make_plan(params, mesh, stage=3, param_specs=specs, min_size=1)
    spread = make({"attention": P(None, "model"), "norm": None})
    assert spread.params["attention"]["q"].spec == spread.params["attention"]["k"].spec == P("data", "model")
    assert spread.params["norm"].spec == P("data")
    assert make(P("model")).params["norm"].spec == P("model")  # one spec for all
    assert make(None).leaves == make({"attention": None, "norm": P()}).leaves


def test_memory_counts_taken_dims_too():
    mesh = planned_mesh(4, 2, names=("data", "model"))
    params, taken = {"w": leaf(16, 32)}, {"w": P(None, "model")}
    memory = lambda stage: zerojax.make_plan(params, mesh, stage=stage, param_specs=taken, min_size=1).memory(
        optax.adam(1e-3)
    )
    half, eighth = 16 * 32 * 4 // 2, 16 * 32 * 4 // 8
    assert [memory(stage).params for stage in range(4)] == [half, half, half, eighth]
    assert [memory(stage).grads for stage in range(4)] == [half, half, eighth, eighth]
    assert [memory(stage).opt_state for stage in range(4)] == [2 * half + 4] + [2 * eighth + 4] * 3


# min_size and strict.


@pytest.mark.parametrize(("min_size", "spec"), [(383, P(None, "data")), (384, P(None, "data")), (385, P())])
def test_min_size_boundary(min_size, spec):
    assert spec_of((16, 24), min_size=min_size) == spec  # 384 elements


def test_min_size_default_is_sixteen_thousand():
    make = lambda n: zerojax.make_plan({"w": leaf(n)}, planned_mesh(8), stage=1)
    assert make(2**14).leaves[0].dim == 0
    assert reasons(make(2**14 - 8)) == {"w": "16376 elements are fewer than min_size=16384"}


def test_min_size_holds_for_state_that_is_no_param():
    """Adafactor's rows have shapes of their own, and are cut or not by them."""
    params = {"w": leaf(64, 128)}
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    plan = lambda min_size: zerojax.make_plan(params, planned_mesh(8), stage=1, min_size=min_size)
    spec = lambda min_size: plan(min_size).opt_state(tx)[0].v_row["w"].spec
    assert spec(64) == P("data")
    assert spec(65) == P()


def test_strict_names_leaf_shape_axis_and_the_way_out():
    params = {"blocks": [{"kernel": leaf(7, 13)}]}
    with pytest.raises(ValueError, match="cannot be sharded") as error:
        zerojax.make_plan(params, planned_mesh(8), stage=1, min_size=91, strict=True)
    for part in ("'blocks/0/kernel'", "[7, 13]", "'data'", "8 devices", "no free dim is a multiple of 8"):
        assert part in str(error.value), part
    for way_out in ("Pad one of its dims to a multiple of 8", "min_size above 91", "strict=False"):
        assert way_out in str(error.value), way_out


def test_the_ways_out_that_strict_names_work():
    make = lambda *shape, **options: zerojax.make_plan(
        {"w": leaf(*shape)}, planned_mesh(8), stage=1, **({"min_size": 91, "strict": True} | options)
    )
    assert make(8, 13).leaves[0].dim == 0
    assert make(7, 13, min_size=92).leaves[0].dim is None
    assert make(7, 13, strict=False).leaves[0].dim is None


def test_strict_leaves_alone_what_is_small_or_empty_and_stage_0():
    small = {"scalar": leaf(), "odd": leaf(7), "empty": leaf(0, 7), "w": leaf(16, 24)}
    plan = zerojax.make_plan(small, planned_mesh(8), stage=3, min_size=8, strict=True)
    assert {"scalar", "odd", "empty"} == reasons(plan).keys()
    zerojax.make_plan({"empty": leaf(0, 7)}, planned_mesh(8), stage=3, min_size=0, strict=True)
    zerojax.make_plan({"w": leaf(7, 13)}, planned_mesh(8), stage=0, min_size=1, strict=True)  # nothing is to be cut
    with pytest.raises(ValueError, match=r"leaf 'w' .* cannot be sharded"):
        zerojax.make_plan({"w": leaf(7, 13)}, planned_mesh(8), stage=1, min_size=1, strict=True)


def test_strict_sees_taken_dims():
    mesh = planned_mesh(4, 2, names=("data", "model"))
    with pytest.raises(ValueError, match=r"leaf 'w' .* cannot be sharded"):
        zerojax.make_plan({"w": leaf(7, 8)}, mesh, stage=1, param_specs=P(None, "model"), min_size=1, strict=True)


# What make_plan refuses.

TWO_AXES = planned_mesh(4, 2, names=("data", "model"))


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"stage": 4}, ValueError, ["stage", "(0, 1, 2, 3)", "4"]),
        ({"stage": -1}, ValueError, ["stage", "-1"]),
        ({"stage": "2"}, ValueError, ["stage", "'2'"]),
        ({"stage": None}, ValueError, ["stage", "None"]),
        ({"axis": "fsdp"}, ValueError, ["'fsdp'", "('data', 'model')", "axis="]),
        ({"axis": ("data", "fsdp")}, ValueError, ["'fsdp'", "('data', 'model')"]),
        ({"axis": ()}, ValueError, ["axis", "at least one"]),
        ({"axis": ("data", "data")}, ValueError, ["axis", "once", "('data', 'data')"]),
        ({"mesh": "data"}, TypeError, ["mesh", "str", "jax.make_mesh"]),
        ({"mesh": None}, TypeError, ["mesh", "NoneType"]),
        ({"mesh": [0, 1]}, TypeError, ["mesh", "list"]),
        ({"params": {"w": "kernel"}}, TypeError, ["'w'", "'kernel'", "str"]),
        ({"params": {"a": [leaf(8), object]}}, TypeError, ["'a/1'", "type"]),
        ({"param_specs": {"w": P(None, None, "model")}}, ValueError, ["'w'", "3 entries", "[16, 24]", "2 dims"]),
        ({"param_specs": {"w": P("expert")}}, ValueError, ["'w'", "'expert'", "('data', 'model')"]),
        ({"param_specs": {"w": P(("model", "expert"))}}, ValueError, ["'w'", "'expert'"]),
        ({"param_specs": {"w": P("data")}}, ValueError, ["'w'", "'data'", "ZeRO axis"]),
        ({"param_specs": {"w": P(None, ("model", "data"))}}, ValueError, ["'w'", "'data'", "ZeRO axis"]),
        (
            {"params": {"w": leaf(16, 7)}, "param_specs": {"w": P(None, "model")}},
            ValueError,
            ["'w'", "dim 1", "[16, 7]", "2 shards"],
        ),
        ({"param_specs": {"v": P()}}, ValueError, ["param_specs is no prefix of params", "'v'"]),
        ({"param_specs": {"w": {"kernel": P()}}}, ValueError, ["param_specs is no prefix of params"]),
        ({"param_specs": {"w": "model"}}, TypeError, ["PartitionSpec", "'model'", "str"]),
        ({"param_specs": "model"}, TypeError, ["PartitionSpec", "'model'", "str"]),
    ],
)
def test_make_plan_refuses(options, error, parts):
    arguments = {"params": {"w": leaf(16, 24)}, "mesh": TWO_AXES, "stage": 2} | options
    with pytest.raises(error) as raised:
        zerojax.make_plan(arguments.pop("params"), arguments.pop("mesh"), **arguments)
    for part in parts:
        assert part in str(raised.value), str(raised.value)


def test_check_accepts_what_was_planned_and_names_what_was_not():
    shapes = {"a": [leaf(16, 24), leaf(7)], "b": leaf()}
    plan = zerojax.make_plan(shapes, planned_mesh(8), stage=2)
    plan.check(shapes)
    plan.check({"a": [np.zeros((16, 24)), np.zeros(7)], "b": 0.0})
    wrong = [
        ({"a": [leaf(16, 24), leaf(7)]}, ["lack the leaf 'b' []"]),
        ({"a": [leaf(16, 24)], "b": leaf()}, ["lack the leaf 'a/1' [7]"]),
        (shapes | {"c": leaf(3)}, ["have a leaf 'c' [3]", "the plan lacks"]),
        (shapes | {"a": [leaf(24, 16), leaf(7)]}, ["'a/0'", "(24, 16)", "(16, 24)"]),
        (shapes | {"b": leaf(1)}, ["'b'", "(1,)", "()"]),
        (shapes | {"a": (leaf(16, 24), leaf(7))}, ["other containers", "(*, *)", "[*, *]"]),
        ([leaf(16, 24), leaf(7), leaf()], ["lack the leaf 'a/0'"]),
    ]
    for params, parts in wrong:
        with pytest.raises(ValueError, match=r"^gradients") as error:
            plan.check(params, "gradients")
        for part in [*parts, "make a plan from these gradients"]:
            assert part in str(error.value), str(error.value)


# Bytes.


def hand_counted(stage, params_bytes, grads_bytes, moment_bytes):
    """Bytes a device of {"w": [16, 24], "b": [24], "odd": [7, 13]} over 8 devices, b and odd being left whole."""
    cut = lambda sharded: 16 * 24 // 8 if sharded else 16 * 24
    count = lambda sharded: cut(sharded) + 24 + 7 * 13
    return (
        params_bytes * count(stage >= 3),
        grads_bytes * count(stage >= 2),
        2 * moment_bytes * count(stage >= 1) + 4,  # mu, nu, and an int32 count
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dtypes", "sizes"),
    [
        ({}, (4, 4, 4)),
        ({"grad_dtype": "bfloat16"}, (4, 2, 4)),
        ({"param_dtype": jnp.bfloat16}, (2, 2, 2)),  # Optax's moments follow the params, gradients too
        ({"param_dtype": "bfloat16", "grad_dtype": jnp.float32}, (2, 4, 2)),
    ],
)
def test_memory_against_counting_by_hand(stage, dtypes, sizes):
    params = {"w": leaf(16, 24), "b": leaf(24), "odd": leaf(7, 13)}
    plan = zerojax.make_plan(params, planned_mesh(8), stage=stage, min_size=25)
    memory = plan.memory(optax.adam(1e-3), **dtypes)
    assert (memory.params, memory.grads, memory.opt_state) == hand_counted(stage, *sizes)
    assert memory.total == memory.params + memory.grads + memory.opt_state
    assert memory.host == 0


def test_memory_keeps_the_dtype_of_what_is_no_float():
    params = {"w": leaf(16, 24), "table": leaf(8, dtype="int8")}
    plan = zerojax.make_plan(params, planned_mesh(8), stage=0)
    assert plan.memory(optax.sgd(0.1)).params == 16 * 24 * 4 + 8
    assert plan.memory(optax.sgd(0.1), param_dtype="float16").params == 16 * 24 * 2 + 8


def mixed_precision_adam():
    """State of 12 bytes a param whatever the params' dtype: the K = 12 of the ZeRO paper (weights, two moments)."""
    zeros = lambda params: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    return optax.GradientTransformation(lambda params: [zeros(params) for _ in range(3)], lambda g, s, p=None: (g, s))


@pytest.mark.parametrize(
    ("devices", "billions", "stage_gb"),
    [
        (1, 7.5, (120, 120, 120, 120)),
        (4, 7.5, (120, 52.5, 41.25, 30)),
        (64, 7.5, (120, 31.40625, 16.640625, 1.875)),
        (64, 128, (2048, 536, 284, 32)),
        (1024, 1000, (16000, 4011.71875, 2013.671875, 15.625)),
    ],
)
def test_memory_is_table_1_of_the_zero_paper(devices, billions, stage_gb):
    """arXiv:1910.02054, Table 1: 16-bit params and gradients, 12 bytes a param of optimizer state."""
    params = {"w": leaf(round(billions * GB) // 100, 100)}
    assert params["w"].shape[0] % devices == 0
    plans = [zerojax.make_plan(params, planned_mesh(devices), stage=stage) for stage in range(4)]
    got = [plan.memory(mixed_precision_adam(), param_dtype="bfloat16").total / GB for plan in plans]
    assert got == list(stage_gb)


def test_memory_of_float32_adam_at_7_5_billion_params():
    """Where a JAX user starts: params 4 bytes, gradients 4, moments 8, over 64 devices."""
    params = {"w": leaf(75_000_000, 100)}
    for stage, parts in enumerate([(30, 30, 60), (30, 30, 0.9375), (30, 0.46875, 0.9375), (0.46875, 0.46875, 0.9375)]):
        memory = zerojax.make_plan(params, planned_mesh(64), stage=stage).memory(optax.adamw(1e-3))
        assert (memory.params / GB, memory.grads / GB, (memory.opt_state - 4) / GB) == parts


def held_on_each_device(tree):
    """Bytes that each device really holds of the arrays in `tree`."""
    held = dict.fromkeys(jax.devices(), 0)
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


OPTIMIZERS = {
    "clipped adamw": models.clipped_adamw,
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "adam with bfloat16 mu": lambda: optax.adam(1e-3, mu_dtype="bfloat16"),
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_is_what_a_train_state_really_holds(stage):
    params = models.mlp_params()
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=stage, min_size=64)
    for make in OPTIMIZERS.values():
        tx = make()
        state, memory = zerojax.create_train_state(params, tx, plan), plan.memory(tx)
        assert held_on_each_device(state.params) == {memory.params}
        assert held_on_each_device(state.opt_state) == {memory.opt_state}
    _, grads = zerojax.value_and_grad(models.mlp_loss, plan)(state.params, models.mlp_batches(1)[0])
    assert held_on_each_device(grads) == {memory.grads}


def test_memory_is_what_a_tensor_parallel_train_state_really_holds():
    params = models.mlp_params()
    specs = jax.tree.map(lambda _: None, params) | {
        "tied": P("model"),
        "inner": {"kernel": P(None, "model"), "bias": P("model")},
    }
    plan = zerojax.make_plan(
        params, models.mesh_of(4, 2, names=("data", "model")), stage=3, param_specs=specs, min_size=64
    )
    tx = optax.adam(1e-3)
    state, memory = zerojax.create_train_state(params, tx, plan), plan.memory(tx)
    assert held_on_each_device(state.params) == {memory.params}
    assert held_on_each_device(state.opt_state) == {memory.opt_state}


# What people read.


def test_table_shows_each_leaf_and_why_it_is_whole():
    mesh = planned_mesh(4, 2, names=("data", "model"))
    params = {"w": leaf(64, 32), "odd": leaf(7, 13), "small": leaf(8), "full": leaf(6, 32, dtype="bfloat16")}
    specs = {"w": P("model"), "odd": None, "small": None, "full": P(None, "model")}
    plan = zerojax.make_plan(params, mesh, stage=2, param_specs=specs, min_size=9)
    table = plan.table(optax.adam(1e-3))
    rows = {line.split()[0]: " ".join(line.split()) for line in table.splitlines()}
    assert rows["ZeRO"] == "ZeRO stage 2 over 4 devices (mesh axis data): bytes on each"
    assert rows["w"] == "w [64, 32] float32 'model', 'data' 4.1 kB 1.02 kB"  # 4096 and 1024 bytes
    assert rows["odd"] == "odd [7, 13] float32 whole 364 B 364 B"
    assert rows["small"] == "small [8] float32 whole 32 B 32 B"
    assert rows["full"] == "full [6, 32] bfloat16 None, 'model' 192 B 192 B"
    assert rows["total"] == "total 4.68 kB 1.61 kB"
    why = [line for line in table.splitlines() if line.startswith("whole: ")]
    assert why == [
        "whole: full: no free dim is a multiple of 4",
        "whole: odd: no free dim is a multiple of 4",
        "whole: small: 8 elements are fewer than min_size=9",
    ]
    *lines, memory, parts = table.splitlines()
    assert memory == str(plan.memory(optax.adam(1e-3)))
    small = "mu bfloat16 192 B, mu float32 1.42 kB, nu bfloat16 192 B, nu float32 1.42 kB"  # of `full`, and of the rest
    assert parts == f"opt_state: count int32 4 B, {small}"
    assert str(plan) == plan.table() == "\n".join(lines)


def test_table_of_stage_0_shows_nothing_as_sharded():
    plan = zerojax.make_plan({"w": leaf(16, 24)}, planned_mesh(8), stage=0, min_size=1)
    row = next(line for line in plan.table().splitlines() if line.startswith("w "))
    assert "data" not in row
    assert "whole" in row
