"""Sizes and training recipes of the papers, shared by the files in configs/. What a paper leaves open is in docs/variants.md."""

from ml_collections import ConfigDict

from flexmemory.config import default_config

SMOKE = dict(layers=2, d_model=32, n_heads=4, d_ff=88)

# MemoryLLM Table 5, heads by arithmetic; d_ff is the base width, of which flex layers take shares
MEMORYLLM_SIZES = {
    "1b": dict(layers=24, d_model=2048, n_heads=32, d_ff=5464),
    "750m": dict(layers=24, d_model=1600, n_heads=16, d_ff=4272),
    "250m": dict(layers=24, d_model=960, n_heads=16, d_ff=2560),
    "smoke": SMOKE,
}

# STEM section 1.6: Llama-3.2-1B and MobileLLM-350M shapes
STEM_SIZES = {
    "1b": dict(layers=16, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=8192, vocab_size=128_256, rope_base=500_000.0),
    "350m": dict(layers=32, d_model=960, n_heads=15, n_kv_heads=5, d_ff=2560, vocab_size=32_000),
    "smoke": dict(SMOKE, layers=4),
}


def memoryllm_recipe(size: dict, pattern: str) -> ConfigDict:
    """Table 3 of MemoryLLM for 50B tokens: C4, sequence 2,048, lr 1e-4 to 1e-5 cosine, 5,000 warm-up steps, decay 0.1, z-loss 1e-6.

    The batch of 512 sequences is ours; the paper gives none.
    """
    c = _base(size, pattern)
    if size["layers"] == SMOKE["layers"]:
        return c
    c.model.vocab_size, c.model.compute_dtype, c.model.remat = 128_256, "bfloat16", True
    c.data.seq_len, c.data.batch_size = 2048, 512
    _long_run(c, steps=47_684)
    c.optimizer.lr, c.optimizer.min_lr, c.optimizer.warmup_steps = 1e-4, 1e-5, 5000
    return c


def stem_recipe(size: dict, pattern: str) -> ConfigDict:
    """STEM section 1.6: batch 512, AdamW .9/.95, decay 0.1 also on tables, cosine; lr 2e-3 at 350m, 4e-4 at 1b.

    Sequence 4,096, 2,000 warm-up steps, clip 1 and min lr of a tenth come from the authors' later code; the paper gives none.
    """
    c = _base(size, pattern)
    if "vocab_size" not in size:
        return c
    c.model.compute_dtype, c.model.remat = "bfloat16", True
    c.data.seq_len, c.data.batch_size = 4096, 512
    _long_run(c, steps=47_684 if size["layers"] == 32 else 476_838)  # 100B and 1T tokens
    c.optimizer.lr = 2e-3 if size["layers"] == 32 else 4e-4
    c.optimizer.min_lr, c.optimizer.warmup_steps = c.optimizer.lr / 10, 2000
    c.optimizer.table_weight_decay = 0.1
    return c


def _base(size: dict, pattern: str) -> ConfigDict:
    c = default_config()
    c.model.update({name: value for name, value in size.items() if name != "layers"})
    c.model.pattern = pattern
    c.data.seq_len, c.data.batch_size = 32, 4
    c.train.steps, c.train.eval_tokens, c.optimizer.warmup_steps = 3, 512, 1
    return c


def _long_run(c: ConfigDict, steps: int) -> None:
    c.train.steps, c.train.eval_every, c.train.checkpoint_every, c.train.eval_tokens = steps, 1000, 1000, 1_048_576
    c.train.log_every, c.train.keep_checkpoints = 20, 3
