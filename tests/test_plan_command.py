"""`python -m zerojax plan` and `explain`: their numbers against plans and arrays, and what they say."""

import dataclasses
import importlib
import json
import math
import pathlib
import subprocess
import sys

import jax
import models
import optax
import pytest

import zerojax
from zerojax import __main__ as command_line
from zerojax import config, fit, report, sizes
from zerojax.commands_plan import explain, plan

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = sizes.Sizes(layers=2, width=32, hidden=128, heads=2, kv_heads=2, vocab=64, context=16)


@pytest.fixture(scope="module")
def gpt():
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module("gpt")


def test_sizes_are_those_of_the_example_gpt(gpt):
    for size in gpt.SIZES.values():
        shapes = jax.eval_shape(gpt.make_init(gpt.GPT(size)), jax.random.key(0))
        planned = sizes.of_model({k: getattr(size, k) for k in ("layers", "width", "heads", "vocab", "context")})
        by_name = lambda tree: {
            jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        assert by_name(planned.shapes()) == by_name(shapes)


def test_numbers_are_the_plans(gpt):
    """The GPT of 1.3B: what the planner says and what a plan of the model itself says, which arrays then take."""
    shapes = jax.eval_shape(gpt.make_init(gpt.GPT(gpt.SIZES["1.3B"])), jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    size = sizes.of_count(1.3e9, context=1024)
    found = {s.name: s for s in fit.settings(config.default(), size, 8, dtype="bfloat16", remat=False)}
    for stage in range(4):
        memory = zerojax.make_plan(shapes, mesh, stage=stage).memory(optax.adamw(1e-3))
        want = memory.params + memory.opt_state
        assert found[f"stage {stage}"].at_rest == pytest.approx(want, rel=0.05)  # of_count's model is 1 % smaller
    assert found["stage 3, offload"].host == found["stage 3"].opt_state - 4  # the count stays
    assert found["stage 3, bfloat16 moments"].opt_state == pytest.approx(found["stage 3"].opt_state / 2, rel=0.01)
    assert found["stage 3, int8 moments"].opt_state == pytest.approx(found["stage 3"].opt_state * 2.07 / 8, rel=0.01)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_at_rest_is_what_arrays_hold(stage, precision):
    c = config.default()
    c.zero.stage, c.zero.min_size, c.precision.params = stage, 64, precision
    mesh = models.mesh_of(8)
    made = zerojax.make_plan(TINY.shapes(precision), mesh, **config.plan_options(c))
    tx = config.make_optimizer(c)
    state = zerojax.create_train_state(
        lambda: jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), TINY.shapes(precision)), tx, made
    )
    (found,) = [s for s in fit.settings(c, TINY, 8, dtype="float32", remat=False) if s.name == f"stage {stage}"]
    assert found.at_rest == report.device_bytes((state.params, state.opt_state))


@pytest.mark.parametrize("llama", [False, True])
def test_the_loss_that_is_compiled_is_a_language_models(llama):
    size = dataclasses.replace(TINY, gated=llama, plain=llama, tied=not llama, kv_heads=1 if llama else 2)
    keys = iter(jax.random.split(jax.random.key(0), 32))
    params = jax.tree.map(lambda x: 0.02 * jax.random.normal(next(keys), x.shape), size.shapes())
    tokens = jax.random.randint(jax.random.key(1), (4, 17), 0, 64)
    loss = size.loss(params, tokens, dtype="float32")
    assert float(loss) == pytest.approx(math.log(64), rel=0.05)  # it knows nothing yet
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % 64)
    logits_only = size.loss(params, changed, dtype="float32") - loss  # the last token is a target alone
    assert 0 < abs(float(logits_only)) < 0.1
    assert size.count == sum(x.size for x in jax.tree.leaves(params))


# LAMB wants whole leaves: of a model that stacks its layers four of the largest are all of the state.
@pytest.mark.parametrize(("name", "share"), [("adamw", 0.5), ("lamb", 1.0), ("lion", 1.0)])
def test_state_that_is_not_streamed_in_pieces_has_to_fit(name, share):
    c = config.default()
    c.optimizer.name = name
    c.zero.offload.bucket_bytes = 2**20
    size = dataclasses.replace(TINY, width=256, hidden=1024)
    found = {s.name: s for s in fit.settings(c, size, 1, dtype="bfloat16", remat=False)}
    on_device, whole = (found[key].opt_state for key in ("stage 1, offload", "stage 1"))
    assert on_device < share * whole if share < 1 else on_device == whole


@pytest.mark.parametrize("count", [3e6, 125e6, 350e6, 1.3e9, 7e9, 70e9, 1e12])
def test_a_count_is_met(count):
    assert sizes.of_count(count).count == pytest.approx(count, rel=0.02)


def test_counts_of_known_models():
    llama7 = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    assert sizes.of_model(llama7 | {"vocab_size": 32000}).count == 6_738_415_616
    gpt2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    assert sizes.of_model(gpt2).count == 124_439_808
    with pytest.raises(ValueError, match="does not say layers, vocab"):
        sizes.of_model({"hidden_size": 8, "num_attention_heads": 2})


def test_plan_says_what_fits(capsys, tmp_path):
    assert plan(["--params=7e9", "--devices=8", "--device-memory=80e9", f"--plot={tmp_path / 'p.png'}"]) == 0
    out = capsys.readouterr().out
    assert "stage 0" in out and "does not fit" in out and "as configured" in out
    assert "The first that fits is stage 1: --config.zero.stage=1" in out
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert plan(["--params=70e9", "--devices=1", "--device-memory=8e9"]) == 0
    assert "No setting fits" in capsys.readouterr().out


def test_plan_reads_a_deepspeed_file_and_keys(capsys):
    path = ROOT / "tests" / "deepspeed" / "zero2_bf16.json"
    assert plan([f"--config={path}", "--params=1e9", "--config.optimizer.mu_dtype=bfloat16", "--remat"]) == 0
    said = capsys.readouterr()
    assert "bfloat16 params" in said.out and "overlap_comm" in said.err
    assert "The first that fits is as configured." in said.out
    offloaded = [f"--config={path.with_name('hf_zero3_offload_auto.json')}", "--params=7e9", "--device-memory=50e9"]
    assert plan(offloaded) == 0
    out = capsys.readouterr().out
    rows = {line[:27].strip(): line[27:].split() for line in out.splitlines()}
    assert rows["as configured"][:9] == rows["stage 3, offload"][:9] and rows["stage 3"][-3:-1] == ["0", "B"]


def test_plan_reads_a_program_and_a_models_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert plan(["--config=configs/gpt_350m.py", "--context=512"]) == 0
    assert "24 layers, width 1024" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 99}))
    assert plan([f"--params={tmp_path / 'config.json'}"]) == 0
    assert "3 layers, width 64" in capsys.readouterr().out


def test_plan_compiles(capsys):
    options = ["--params=3e6", "--context=64", "--devices=8", "--compile", "--rows=2", "--dtype=float32"]
    assert plan([*options, "--config.zero.stage=3", "--config.zero.min_size=64"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    size = dataclasses.replace(sizes.of_count(3e6), context=64)
    at_rest = size.count * 4 * 3 / 8  # params and two moments, an eighth each; the batch is small
    said = float(line.split("arguments ")[1].split(" MB")[0]) * 1e6
    assert "stage 3, 2 rows a device" in line and said == pytest.approx(at_rest, rel=0.05)
    assert plan(["--params=3e6", "--devices=99", "--compile"]) == 2


def test_explain_names_what_is_whole(capsys):
    assert explain(["--params=7e9", "--config.zero.stage=3", "--devices=7"]) == 0
    out = capsys.readouterr().out
    assert "norm/bias" in out and "fewer than min_size" in out and "no free dim is a multiple of 7" in out
    assert explain(["--params=7e9", "--config.zero.stage=1", "--config.zero.min_size=1"]) == 0
    assert "All 16 leaves are sharded" in capsys.readouterr().out
    assert explain(["--params=7e9"]) == 0
    assert "Stage 0 shards nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the config has no section 'model': say --params=7e9"),
        (["--params=many"], "neither a number of params nor a file"),
        (["--params=7"], "at least a million"),
        (["--params=7e9", "--config.zero.stge=1"], "no key 'zero.stge'; the nearest is 'zero.stage'"),
        (["--params=7e9", "--config.zero.stage=9"], "'zero.stage' must be one of"),
        (["--params=7e9", "--what"], "unknown argument '--what'"),
        (["--params=7e9", "--config=gone.json"], "gone.json"),
    ],
)
def test_errors_end_with_two(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        plan(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_the_command_line_lists_its_commands(capsys):
    assert command_line.main(["plam"]) == 2
    assert "plan" in (err := capsys.readouterr().err) and "explain" in err
    assert command_line.main(["keys"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in config.KEYS) and "Names of the mesh axes." in out
    assert command_line.main(["keys", "--deepspeed"]) == 0 and "`train_batch_size`" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "zerojax", "plan", "--params=70e9", "--devices=64"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "The first that fits is stage 3" in done.stdout, done.stderr


def test_params_in_host_memory_are_planned_where_they_can_be(capsys):
    asked = ["--config.zero.stage=3", "--config.zero.offload.device=pinned_host", "--config.zero.offload.params=True"]
    assert plan([*asked, "--params=1e8"]) == 0
    assert "stage 2, offload" in capsys.readouterr().out
