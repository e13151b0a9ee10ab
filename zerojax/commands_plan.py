"""`python -m zerojax plan` and `explain`."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import math
import pathlib
import runpy
import sys
import warnings
from typing import Any

import jax
from ml_collections import ConfigDict

from zerojax import config as configs
from zerojax import fit, report, schema
from zerojax import sizes as model_sizes

_EXAMPLE = "python -m zerojax plan --params=7e9 --devices=8 --device-memory=80e9"


def plan(argv: list[str]) -> int:
    """Prints what each stage takes on each device, with and without offload and small moments, and what fits."""
    parser = _parser("plan", plan.__doc__)
    parser.add_argument("--device-memory", type=float, default=141e9, help="bytes of each device (141e9: an H200)")
    parser.add_argument("--rows", type=int, help="with --compile: rows of a micro-batch on each device")
    parser.add_argument(
        "--compile", action="store_true", help="compile the config's own stage here, and read XLA's sum"
    )
    parser.add_argument("--plot", metavar="FILE", help="stacked bars as PNG")
    args, c, sizes = _read(parser, argv)
    options: Any = {"dtype": args.dtype or _activations(c), "remat": args.remat}
    found = fit.settings(c, sizes, args.devices, **options)
    print(
        f"{sizes.count / 1e9:.3g}B params ({sizes.layers} layers, width {sizes.width}), {c.precision.params} params, "
        f"{c.optimizer.name}, {args.devices} devices of {report.format_bytes(args.device_memory)}, bytes on each; how "
        f"many rows of {sizes.context} tokens, with activations in {options['dtype']}, is an estimate\n"
    )
    print(fit.table(found, args.device_memory))
    if args.plot:
        part = lambda s: {"params": s.params, "optimizer": s.opt_state, "gradients": s.grads}
        bars = {s.name: {k: b / 1e9 for k, b in part(s).items()} for s in found}
        report.plot_stacked(bars, args.plot, ylabel="GB on each device", limit=args.device_memory / 1e9)
        print(f"\nWrote {args.plot}.")
    return _compile(args, c, sizes, options) if args.compile else 0


def explain(argv: list[str]) -> int:
    """Prints which params the config's stage leaves whole, why, and what that costs."""
    args, c, sizes = _read(_parser("explain", explain.__doc__), argv)
    if not c.zero.stage:
        print("Stage 0 shards nothing: --config.zero.stage=1 shards the optimizer's state.")
        return 0
    made = fit.plan_of(c, sizes, args.devices)
    print(str(made).splitlines()[0])
    whole = list(made.unsharded())
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    rows = [[leaf.name, list(leaf.shape), report.format_bytes(size(leaf)), leaf.reason] for leaf in whole]
    if not rows:
        print(f"All {len(made.leaves)} leaves are sharded.")
        return 0
    print(report.text_table(["whole on every device", "shape", "bytes", "why"], rows))
    print(
        f"\n{len(whole)} of {len(made.leaves)} leaves, {report.format_bytes(sum(map(size, whole)))} of params on each "
        "device. To shard more: pad a dim to a multiple of the devices, or lower --config.zero.min_size; "
        "--config.zero.strict=True makes a large one an error."
    )
    return 0


def _parser(name: str, text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m zerojax {name}",
        description=text,
        epilog=f"Keys of the config: --config.zero.stage=3 and the like. Example: {_EXAMPLE}",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a DeepSpeed JSON, or a .py with get_config()")
    parser.add_argument(
        "--params", default="", help="how many (7e9), or a model's config.json; else the config's model"
    )
    parser.add_argument("--devices", type=int, default=8, help="that ZeRO shards over")
    parser.add_argument("--context", type=int, help="tokens of a row; the model's by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of activations")
    parser.add_argument("--remat", action="store_true", help="layers are computed again in the backward pass")
    return parser


def _read(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, ConfigDict, model_sizes.Sizes]:
    args, rest = parser.parse_known_args(argv)
    try:
        whole = _config(args.config)
        c = configs.check(whole)
        for flag in rest:
            _override(c, flag)
        sizes = model_sizes.read(args.params, whole)
        if args.context:
            sizes = dataclasses.replace(sizes, context=args.context)
    except (ValueError, TypeError, OSError) as e:
        parser.error(str(e))
    return args, c, sizes


def _config(path: str | None) -> ConfigDict:
    """The config of a file, with the sections of the program that it is for."""
    if path is None:
        return configs.default()
    if pathlib.Path(path).suffix != ".py":
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            c = configs.from_deepspeed(path)
        for note in notes:
            print(note.message, file=sys.stderr)
        return c
    sys.path.insert(0, "")  # a config file may build upon another
    made: ConfigDict = runpy.run_path(path)["get_config"]()
    return made


def _override(c: ConfigDict, flag: str) -> None:
    name, equals, value = flag.partition("=")
    key = name.removeprefix("--config.")
    if key == name or not equals:
        raise ValueError(f"unknown argument {flag!r}.")
    if key not in schema.KEYS:
        close = schema.nearest(key, schema.KEYS)
        raise ValueError(f"the config has no key {key!r}" + (f"; the nearest is {close!r}." if close else "."))
    parsed: Any = value
    with contextlib.suppress(ValueError, SyntaxError):
        parsed = ast.literal_eval(value)
    c.update_from_flattened_dict({key: schema.checked(key, parsed)})


def _activations(c: ConfigDict) -> str:
    return "bfloat16" if c.precision.params == "float32" else c.precision.params


def _compile(args: argparse.Namespace, c: ConfigDict, sizes: model_sizes.Sizes, options: dict[str, Any]) -> int:
    with contextlib.suppress(RuntimeError):  # JAX has begun already
        jax.config.update("jax_num_cpu_devices", args.devices)
    if len(jax.devices()) < args.devices:
        print(f"--compile needs {args.devices} devices, there are {len(jax.devices())}.", file=sys.stderr)
        return 2
    mesh = jax.make_mesh(
        (args.devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[: args.devices]
    )
    rows = args.rows or c.batch.micro_rows or 1
    found = fit.compiled_bytes(c, sizes, mesh, rows, **options)
    numbers = ", ".join(f"{name} {report.format_bytes(size)}" for name, size in found.items())
    kind = jax.devices()[0].device_kind
    print(f"\nCompiled for {args.devices} x {kind}, stage {c.zero.stage}, {rows} rows a device: {numbers}.")
    return 0
