"""Sizes and training recipes of the papers, shared by the files in configs/. What a paper leaves
open is in docs/variants.md.
"""

from ml_collections import ConfigDict

from flexmemory.config import default_config

SMOKE_MODEL = dict(d_model=32, n_heads=4, d_ff=88)
LLAMA3_VOCAB = 128_256

# MemoryLLM Table 5, heads by arithmetic; d_ff is the base width, of which flex layers take shares
MEMORYLLM_SIZES = {
    "1b": dict(layers=24, model=dict(d_model=2048, n_heads=32, d_ff=5464, vocab_size=LLAMA3_VOCAB)),
    "750m": dict(
        layers=24, model=dict(d_model=1600, n_heads=16, d_ff=4272, vocab_size=LLAMA3_VOCAB)
    ),
    "250m": dict(
        layers=24, model=dict(d_model=960, n_heads=16, d_ff=2560, vocab_size=LLAMA3_VOCAB)
    ),
    "smoke": dict(layers=2, model=SMOKE_MODEL),
}

# STEM section 1.6: Llama-3.2-1B and MobileLLM-350M shapes; 1T and 100B tokens
STEM_SIZES = {
    "1b": dict(
        pattern="(dense {0} dense)*5 dense",
        steps=476_838,
        lr=4e-4,
        model=dict(
            d_model=2048,
            n_heads=32,
            n_kv_heads=8,
            d_ff=8192,
            vocab_size=LLAMA3_VOCAB,
            rope_base=500_000.0,
        ),
    ),
    "350m": dict(
        pattern="(dense {0} dense)*10 dense*2",
        steps=47_684,
        lr=2e-3,
        model=dict(d_model=960, n_heads=15, n_kv_heads=5, d_ff=2560, vocab_size=32_000),
    ),
    "smoke": dict(pattern="dense {0} dense dense", model=SMOKE_MODEL),
}


def memoryllm_recipe(size: dict, pattern: str) -> ConfigDict:
    """Table 3 of MemoryLLM for 50B tokens: C4, sequence 2,048, lr 1e-4 to 1e-5 cosine, 5,000
    warm-up steps, decay 0.1, z-loss 1e-6.

    The batch of 512 sequences, in micro-batches of 8, is ours; the paper gives none.
    """
    if size["model"] is SMOKE_MODEL:
        return smoke(pattern)
    c = paper_run(size, pattern, steps=47_684)
    c.data.seq_len, c.train.accum_steps = 2048, 64
    c.optimizer.lr, c.optimizer.min_lr, c.optimizer.warmup_steps = 1e-4, 1e-5, 5000
    return c


def stem_recipe(size: dict, kind: str) -> ConfigDict:
    """STEM section 1.6: batch 512, AdamW .9/.95, decay 0.1 also on tables, cosine; lr 2e-3 at 350m,
    4e-4 at 1b.

    Sequence 4,096, 2,000 warm-up steps, clip 1 and min lr of a tenth come from the authors' later
    code; the paper gives none.
    """
    pattern = size["pattern"].format(kind)
    if size["model"] is SMOKE_MODEL:
        return smoke(pattern)
    c = paper_run(size, pattern, steps=size["steps"])
    c.data.seq_len, c.train.accum_steps = 4096, 128
    c.optimizer.lr, c.optimizer.min_lr, c.optimizer.warmup_steps = size["lr"], size["lr"] / 10, 2000
    c.optimizer.table_weight_decay = 0.1
    return c


def smoke(pattern: str) -> ConfigDict:
    """A model and a run of seconds, to try a pattern."""
    c = default_config()
    c.model.update(SMOKE_MODEL)
    c.model.pattern = pattern
    c.data.seq_len, c.data.batch_size = 32, 4
    c.train.steps, c.train.eval_tokens, c.optimizer.warmup_steps = 3, 512, 1
    return c


def paper_run(size: dict, pattern: str, steps: int) -> ConfigDict:
    """What the papers' runs share: bfloat16 compute, recomputed layers, 512 sequences a step,
    cadences of a long run.
    """
    c = default_config()
    c.model.update(size["model"])
    c.model.pattern, c.model.compute_dtype, c.model.remat = pattern, "bfloat16", True
    c.data.batch_size = 512
    c.train.steps, c.train.eval_every, c.train.checkpoint_every, c.train.eval_tokens = (
        steps,
        1000,
        1000,
        1_048_576,
    )
    c.train.log_every, c.train.keep_checkpoints = 20, 3
    return c
