"""How big an experiment runs: the data, model and training settings of each scale, and the variants
that many experiments share.

Experiments that ask for the same run at the same scale get the same name and the same overrides, so
that it is trained once.

    smoke       seconds; in the test suite
    quickstart  half a minute a run on one core; cm_ratio alone (make demo)
    cpu         one to two minutes a run on one core
    gpu         about ten minutes a run on one device (estimated, never run)
    paper       the paper's own configuration, for a cluster (planned, never run)
"""

from experiments.sweeps import Sweep, dotted, product, seeds
from flexmemory.config import default_config
from flexmemory.recipes import MEMORYLLM_SIZES, STEM_SIZES, memoryllm_recipe, stem_recipe

SCALES = ("smoke", "cpu", "gpu", "paper")  # of an experiment that names none
SEEDS = {"smoke": (0,), "quickstart": (0,), "cpu": (0, 1, 2), "gpu": (0, 1, 2), "paper": (0,)}
# for what a headline rests on: an order over three steps is rarely decided by three seeds
MORE_SEEDS = SEEDS | {"cpu": (0, 1, 2, 3, 4)}
ONE_SEED = dict.fromkeys(SEEDS, (0,))  # for what depends on the text alone
LAYERS = {"smoke": 3, "quickstart": 4, "cpu": 6, "gpu": 12}
BASE = {
    "smoke": {
        "prepare.source": "facts:people=4,docs=6+tasks:n=60,eval=12,length=4,pairs=3",
        "prepare.tokenizer": "bpe:400",
        "prepare.val_fraction": 0.1,
        "model.d_model": 32,
        "model.n_heads": 4,
        "model.d_ff": 88,
        "model.init_std": 0.08,
        "data.seq_len": 96,
        "data.batch_size": 4,
        "train.steps": 4,
        "train.log_every": 2,
        "train.eval_tokens": 512,
        "optimizer.warmup_steps": 1,
    },
    "quickstart": {
        "prepare.source": "python-stdlib:max_mb=2+facts:people=24,docs=40+tasks:n=1500",
        "prepare.tokenizer": "bpe:1024",
        "prepare.val_fraction": 0.05,
        "model.d_model": 128,
        "model.n_heads": 4,
        "model.d_ff": 344,
        "model.init_std": 0.08,
        "data.seq_len": 128,
        "data.batch_size": 16,
        "train.steps": 200,
        "train.eval_every": 50,
        "train.eval_tokens": 16_384,
        "optimizer.lr": 3e-3,
        "optimizer.min_lr": 3e-4,
        "optimizer.warmup_steps": 20,
    },
    "cpu": {
        "prepare.source": "python-stdlib:max_mb=12+facts:people=64,docs=40+tasks:n=20000",
        "prepare.tokenizer": "bpe:512",
        "prepare.val_fraction": 0.05,
        "model.d_model": 48,
        "model.n_heads": 4,
        "model.d_ff": 128,
        "model.init_std": 0.08,
        "data.seq_len": 128,
        "data.batch_size": 16,
        "train.steps": 800,
        "train.eval_every": 200,
        "train.eval_tokens": 32_768,
        "optimizer.lr": 3e-3,
        "optimizer.min_lr": 3e-4,
        "optimizer.warmup_steps": 50,
    },
    "gpu": {
        "prepare.source": "python-stdlib+facts:people=2000,docs=40+tasks:n=200000",
        "prepare.tokenizer": "bpe:16384",
        "model.d_model": 768,
        "model.n_heads": 12,
        "model.d_ff": 2048,
        "model.compute_dtype": "bfloat16",
        "data.seq_len": 1024,
        "data.batch_size": 64,
        "train.steps": 1500,
        "train.eval_every": 250,
        "train.eval_tokens": 262_144,
        "train.checkpoint_every": 500,
        "optimizer.lr": 1e-3,
        "optimizer.min_lr": 1e-4,
        "optimizer.warmup_steps": 100,
    },
}
PAPER_DATA = {  # (source, tokenizer); the STEM paper's first stage is a subset of OLMo-Mix
    "memoryllm": ("hf:allenai/c4:config=en", "hf:meta-llama/Llama-3.1-8B"),
    "stem-1b": ("hf:allenai/olmo-mix-1124", "hf:meta-llama/Llama-3.2-1B"),
    "stem-350m": ("hf:allenai/olmo-mix-1124", "hf:facebook/MobileLLM-350M"),
}


def settings(scale: str, paper: str = "memoryllm-1b") -> dict:
    """Overrides of every run at ``scale``, the pattern left out; at paper scale those of ``paper``:
    memoryllm-250m|750m|1b or stem-350m|1b.
    """
    if scale != "paper":
        return BASE[scale]
    family, _, size = paper.partition("-")
    recipe = (
        memoryllm_recipe(MEMORYLLM_SIZES[size], "dense*2")
        if family == "memoryllm"
        else stem_recipe(STEM_SIZES[size], "dense")
    )
    source, tokenizer = PAPER_DATA[family if family == "memoryllm" else paper]
    defaults, left_out = dotted(default_config()), ("model.pattern", "model.vocab_size")
    return {"prepare.source": source, "prepare.tokenizer": tokenizer} | {
        key: value
        for key, value in dotted(recipe).items()
        if value != defaults[key] and key not in left_out
    }


def layers(scale: str, paper: str = "memoryllm-1b") -> int:
    if scale != "paper":
        return LAYERS[scale]
    return 24 if paper.startswith("memoryllm") else {"stem-350m": 32, "stem-1b": 16}[paper]


def sweep(
    scale: str,
    variants: str | Sweep,
    paper: str = "memoryllm-1b",
    numbers: dict[str, tuple[int, ...]] = SEEDS,
) -> Sweep:
    """Every variant, laid over the scale's settings, at every seed of the scale in ``numbers``;
    names of :func:`models` stand for their variants. At paper scale a run's name holds the size:
    "dense@memoryllm-1b-s0".
    """
    if isinstance(variants, str):
        variants = models(variants, layers(scale, paper))
    rows = [settings(scale, paper) | row for row in variants]
    if scale == "paper":
        rows = [row | {"name": f"{row['name']}@{paper}"} for row in rows]
    return product(rows, seeds(numbers[scale]))


def variant(name: str, pattern: str, **fields) -> dict:
    """One variant; fields are of the model's config, e.g. beta="3"."""
    return {"name": name, "model.pattern": pattern} | {
        f"model.{key}": value for key, value in fields.items()
    }


def models(names: str, n: int) -> Sweep:
    """Variants of n layers that many experiments share, by their names.

    dense, memoryllm, attn_only: all layers alike. flex-b1 to flex-b3: equal in total parameters to
    dense and memoryllm, as the paper has it. stem-third, stem-half, stem-full: STEM layers as the
    paper places them, the middle one of every whole three, every second from layer 1, or all but
    layer 0. stem-gate, stem-dagger: that block in place of stem-third's.
    """
    return [model(name, n) for name in names.split()]


def model(name: str, n: int) -> dict:
    kind, _, part = name.partition("-")
    if kind == "flex":
        return variant(name, f"flex*{n}", beta=part.removeprefix("b"))
    if kind != "stem":
        return variant(name, f"{name}*{n}")
    places = {"half": range(1, n, 2), "full": range(1, n)}.get(part, range(1, n - 1, 3))
    block = "stem" if part in ("third", "half", "full") else name
    return variant(name, " ".join(block if i in places else "dense" for i in range(n)))


def equal(mode: str, knob: str, pattern: str) -> dict:
    """The override that solves a width so that the model costs what ``pattern`` does."""
    return {"budget": {"mode": mode, "knob": knob, "like": {"model.pattern": pattern}}}
