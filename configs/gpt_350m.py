"""A GPT of 350M params on the same bytes, for GPUs. Its step on two H200s: benchmarks/results/.

python examples/train_gpt.py --config=configs/gpt_350m.py --workdir=runs/gpt_350m --config.zero.stage=2
"""

import ml_collections

from configs import char_gpt


def get_config() -> ml_collections.ConfigDict:
    """`char_gpt`, larger, in bfloat16 and with its layers unrolled."""
    c = char_gpt.get_config()
    c.model.update(
        {"vocab": 50304, "context": 1024, "layers": 24, "heads": 16, "width": 1024, "dtype": "bfloat16", "unroll": 24}
    )
    c.zero.min_size = 2**14
    c.optimizer.learning_rate = 3e-4
    c.schedule.warmup_num_steps = 100
    return c
