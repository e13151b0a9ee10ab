"""A byte-level GPT of 0.8M params on Python's own documentation and source.

    python examples/train_gpt.py --config=configs/char_gpt.py --workdir=runs/char_gpt --config.zero.stage=3

Any device will do; --config.cpu_devices=8 plays eight on a CPU.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """All values have a type: overrides on the command line are checked against it."""
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.cpu_devices = config_dict.placeholder(int)  # None: the devices there are; a number: as many simulated on the CPU

    c.model = ml_collections.ConfigDict(
        {
            "vocab": 256,
            "context": 128,
            "layers": 4,
            "heads": 4,
            "width": 128,
            "dtype": "float32",
            "unroll": 1,
            "remat": False,
        }
    )
    c.zero = ml_collections.ConfigDict({"stage": 1, "min_size": 1024, "strict": False})
    c.batch = ml_collections.ConfigDict(
        {"rows": 32, "accumulate": 1}
    )  # rows of one step, over devices and micro-batches
    c.optimizer = ml_collections.ConfigDict(
        {"learning_rate": 2e-3, "warmup_steps": 50, "weight_decay": 0.1, "b1": 0.9, "b2": 0.95, "clip_norm": 1.0}
    )

    c.steps = 1000
    c.log_every = 10
    c.eval_every = 200
    c.eval_batches = 4
    c.sample_bytes = 300
    return c
