"""`python -m zerojax COMMAND`: what can be known without training."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "plan": ("zerojax.commands_plan", "what each stage takes on each device, and what fits"),
    "explain": ("zerojax.commands_plan", "which params are not sharded, and why"),
    "checkpoint": ("zerojax.commands_checkpoint", "which steps a directory holds, and what is in one"),
    "keys": ("zerojax.commands_keys", "every key of a config, and what becomes of DeepSpeed's"),
}
"""By name: the module with a function of that name, which takes the arguments, and what it is for."""


def main(argv: list[str]) -> int:
    """Runs a command."""
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:12}{text}" for name, (_, text) in COMMANDS.items()]
        print("\n".join(["usage: python -m zerojax COMMAND [--help]", *lines]), file=sys.stderr)
        return 2
    name, *rest = argv
    return getattr(importlib.import_module(COMMANDS[name][0]), name)(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
