"""The C/M sweep: how much of the FFN must compute on the context, and how much may be read from a table?

Two ways to move the ratio at equal total parameters: beta = 0..3 of every layer's 8h^2 (Flex-MemoryLLM section 4.2), and
n_C of N layers dense near the input, the rest memoryllm near the output. Ends: dense (all C) and attn_only (no FFN at all,
so fewer parameters: what memoryllm is without its rows). stem stands beside them, its width solved for equal totals.

    python -m experiments.run cm_ratio --scale=quickstart --out=runs/demo

The paper's claim (Table 2, Figure 9): perplexity of dense < flex beta 3 < 2 < 1 < memoryllm at equal totals. Cost: quickstart
8 minutes on two cores, measured; cpu about an hour a seed there, estimated from five of its ten variants; gpu about half an hour a seed on
one H100-class device, estimated and never run; paper is a plan for a cluster.
"""

import dataclasses

from flexmemory.config import Config, ModelConfig
from flexmemory.models.accounting import account

# data: prepare's arguments; layers, sets: the model and the run; seeds: paired over all variants
SCALES = {
    "smoke": dict(
        data=dict(source="facts:people=4,docs=6+tasks:n=60,eval=12,length=4,pairs=3", tokenizer="bpe:400", val_fraction=0.1), layers=2, seeds=(0,), betas=(0, 3),
        sets={"model.d_model": 32, "model.n_heads": 4, "model.d_ff": 88, "model.init_std": 0.08, "data.seq_len": 96,
              "data.batch_size": 4, "train.steps": 4, "train.log_every": 2, "train.eval_tokens": 512, "optimizer.warmup_steps": 1}),
    "quickstart": dict(
        data=dict(source="python-stdlib:max_mb=2+facts:people=24,docs=40+tasks:n=1500", tokenizer="bpe:1024", val_fraction=0.05), layers=4, seeds=(0,),
        sets={"model.d_model": 128, "model.n_heads": 4, "model.d_ff": 344, "model.init_std": 0.08, "data.seq_len": 128,
              "data.batch_size": 16, "train.steps": 200, "train.eval_every": 50, "train.eval_tokens": 16_384, "optimizer.lr": 3e-3,
              "optimizer.min_lr": 3e-4, "optimizer.warmup_steps": 20}),
    "cpu": dict(
        data=dict(source="python-stdlib:max_mb=8+facts:people=100,docs=40+tasks:n=10000", tokenizer="bpe:2048", val_fraction=0.05),
        layers=6, seeds=(0, 1, 2),
        sets={"model.d_model": 128, "model.n_heads": 4, "model.d_ff": 344, "model.init_std": 0.08, "data.seq_len": 128,
              "data.batch_size": 16, "train.steps": 1000, "train.eval_every": 100, "train.eval_tokens": 65_536,
              "train.checkpoint_every": 500, "optimizer.lr": 3e-3, "optimizer.min_lr": 3e-4, "optimizer.warmup_steps": 50}),
    "gpu": dict(
        data=dict(source="python-stdlib+facts:people=2000,docs=40+tasks:n=200000", tokenizer="bpe:16384"), layers=12, seeds=(0, 1, 2),
        sets={"model.d_model": 768, "model.n_heads": 12, "model.d_ff": 2048, "model.compute_dtype": "bfloat16", "data.seq_len": 1024,
              "data.batch_size": 64, "train.steps": 1500, "train.eval_every": 250, "train.eval_tokens": 262_144,
              "train.checkpoint_every": 500, "optimizer.lr": 1e-3, "optimizer.min_lr": 1e-4, "optimizer.warmup_steps": 100}),
    "paper": dict(
        data=dict(source="hf:allenai/c4:config=en", tokenizer="hf:meta-llama/Llama-3.1-8B"), layers=24, seeds=(0,),
        sets={"model.d_model": 960, "model.n_heads": 16, "model.d_ff": 2560, "model.compute_dtype": "bfloat16", "model.remat": True,
              "data.seq_len": 2048, "data.batch_size": 512, "train.steps": 23_842, "train.eval_every": 1000,
              "train.eval_tokens": 1_048_576, "train.checkpoint_every": 1000, "optimizer.lr": 1e-4, "optimizer.min_lr": 1e-5,
              "optimizer.warmup_steps": 5000}),
}
PROMPT = "Question: Where was"


def sweep(scale: str) -> dict:
    """{"data": prepare's arguments, "prompt", "runs": [{"name", "axis", "pattern", "beta", "c_fraction", "seed", "sets"}]}."""
    spec, layers = SCALES[scale], SCALES[scale]["layers"]
    rows = [dict(name="dense", axis="end", pattern=f"dense*{layers}", c_fraction=1.0)]
    rows += [dict(name=f"flex-b{beta}", axis="beta", pattern=f"flex*{layers}", beta=beta, c_fraction=beta / 8) for beta in spec.get("betas", (0, 1, 2, 3))]
    splits = sorted({max(1, layers // 4), layers // 2, layers - max(1, layers // 4)})
    rows += [dict(name=f"layers-c{n}", axis="layers", pattern=f"dense*{n} memoryllm*{layers - n}", c_fraction=n / layers) for n in splits]
    stem = "dense " + " ".join("stem" if i % 3 == 1 else "dense" for i in range(1, layers))
    rows += [dict(name="stem", axis="stem", pattern=stem), dict(name="attn_only", axis="end", pattern=f"attn_only*{layers}")]
    runs = []
    for seed in spec["seeds"]:
        for row in rows:
            sets = dict(spec["sets"]) | {"model.pattern": row["pattern"], "train.seed": seed}
            if "beta" in row:
                sets["model.beta"] = str(row["beta"])
            runs.append({"beta": None, "c_fraction": None} | row | {"name": f"{row['name']}-s{seed}", "seed": seed, "sets": sets})
    return {"data": spec["data"], "prompt": PROMPT, "runs": runs}


def fit(cfg: Config, axis: str) -> Config:
    """Sets a stem model's d_ff so that its total parameters equal the dense model's, as near as a whole width allows.

    Totals are linear in d_ff, so two counts give the answer. Needs the data's vocabulary in ``cfg``.
    """
    if axis != "stem":
        return cfg

    def total(pattern: str, d_ff: int) -> int:
        return account(dataclasses.replace(cfg.model, pattern=pattern, d_ff=d_ff))["total"]

    layers = account(cfg.model)["layers"]
    target, low, high = total(f"dense*{layers}", cfg.model.d_ff), total(cfg.model.pattern, 1), total(cfg.model.pattern, 2)
    d_ff = max(1, round(1 + (target - low) / (high - low)))
    model: ModelConfig = dataclasses.replace(cfg.model, d_ff=d_ff)
    return dataclasses.replace(cfg, model=model)
