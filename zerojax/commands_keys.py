"""`python -m zerojax keys`."""

from __future__ import annotations

import argparse

from zerojax import deepspeed_keys, schema


def keys(argv: list[str]) -> int:
    """Prints every key of a config with its default and meaning; or what becomes of DeepSpeed's."""
    parser = argparse.ArgumentParser(prog="python -m zerojax keys", description=keys.__doc__, allow_abbrev=False)
    parser.add_argument("--deepspeed", action="store_true", help="the table of DeepSpeed's keys, as Markdown")
    if parser.parse_args(argv).deepspeed:
        print(deepspeed_keys.markdown())
        return 0
    default = lambda key: f"({key.default.__name__})" if isinstance(key.default, type) else repr(key.default)
    one_of = lambda key: f" One of {', '.join(map(str, key.choices))}." if key.choices else ""
    width = max(len(default(key)) for key in schema.KEYS.values())
    rows = [[name, f"{default(key):{width}}  {key.doc}{one_of(key)}"] for name, key in schema.KEYS.items()]
    first = max(len(name) for name in schema.KEYS)
    print("\n".join(f"{name:{first}}  {text}" for name, text in rows))
    return 0
