"""Parameters, FLOPs and bytes of a model, derived from its abstract parameters, so that a new kind
is counted by itself.

Two counting conventions exist in the papers: MemoryLLM's Table 5 leaves embeddings and head out of
total and active (``total``, ``active``); STEM counts both in, and does not subtract the
up-projections that its tables replace (``paper_total`` of a model with learned rows).
``total_all`` and ``active_all`` are what the model really holds."""

import math
from typing import Any

import jax

from flexmemory.models.blocks import layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.parameters import split
from flexmemory.models.patterns import LayerSpec
from flexmemory.models.transformer import abstract_params

# of rows only, without scales
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}
COUNTS = {
    "total": "total, no embeddings or head",
    "active": "active, no embeddings or head",
    "embed": "embedding + head",
    "total_all": "total, all",
    "active_all": "active, all",
    "paper_total": "total as the paper counts",
    "paper_active": "active as the paper counts",
}


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def matmul_weights(tree: Any) -> int:
    """Weights that multiply activations, of the parameters of stacked layers: all that have a
    matrix's axes after the layers'; a gain has fewer."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if leaf.ndim > 2)


def account(cfg: ModelConfig, seq_len: int = 2048) -> dict:
    """The numbers of docs/variants.md for one model.

    total, active: without embedding and head; active leaves out what the rows replace (live FFNs,
    tables). embed: embedding and head. flops_per_token: forward, rows handed in, averaged over a
    causal sequence of ``seq_len``, head included.
    memory_flops_per_row: forward FLOPs that compute one address's rows (0 for tables).
    row_bytes_per_token: with rows in the compute dtype. read_bytes_per_token: what decoding one
    token alone reads: all active weights, the head, one embedding and the rows, in the compute
    dtype. table_bytes: by row dtype. table_over_ffn: values of the folded table over the FFN
    weights that it replaces. residual: see :func:`residual`."""
    specs, parts = layer_specs(cfg), split(abstract_params(cfg))
    backbone = parts["backbone"]
    embed = size(parts["embed"]) + size(backbone.get("head", {}))
    active = size(backbone["blocks"]) + size(backbone["norm"])
    total = size(parts) - embed
    # q k^T and p v over the causal half
    attention = 4 * cfg.n_heads * cfg.head_width * (seq_len + 1) / 2 * len(specs)
    flops = 2 * matmul_weights(backbone["blocks"]) + attention + 2 * cfg.d_model * cfg.vocab_size
    row_values = sum(spec.row_width for spec in specs)
    replaced = sum(spec.replaces for spec in specs)
    bytes_each = DTYPE_BYTES[cfg.compute_dtype]
    # learned rows are counted as STEM counts
    paper_total, paper_active = total, active
    if any(spec.learned for spec in specs):
        paper_total = total + embed + sum(spec.replaces for spec in specs if spec.learned)
        paper_active = active + embed
    read = active + cfg.d_model * (cfg.vocab_size + 1) + row_values
    values = cfg.vocab_size * row_values
    return {
        "pattern": cfg.pattern,
        "layers": len(specs),
        "total": total,
        "active": active,
        "embed": embed,
        "total_all": total + embed,
        "active_all": active + embed,
        "paper_total": paper_total,
        "paper_active": paper_active,
        "flops_per_token": round(flops),
        "memory_flops_per_row": 2 * matmul_weights(backbone.get("memory", {})),
        "row_bytes_per_token": row_values * bytes_each,
        "read_bytes_per_token": read * bytes_each,
        "row_dtype": cfg.compute_dtype,
        "table_bytes": {name: int(values * n) for name, n in DTYPE_BYTES.items()},
        "table_over_ffn": values / replaced if replaced else None,
        "ffn_widths": [[spec.d_ffn, spec.d_memory] for spec in specs],
        "residual": residual(cfg, specs),
    }


def residual(cfg: ModelConfig, specs: tuple[LayerSpec, ...]) -> float | None:
    """How far rounding moves the FFN weights (FFN-C and FFN-M together) from the papers' nominal 8
    D^2 per layer, as a share of a layer's 12 D^2. None where the pattern has layers of another form
    (stem, attn_only)."""
    if not all(spec.nominal for spec in specs):
        return None
    d = cfg.d_model
    ffn = sum(3 * d * s.d_memory + (s.square * d**2 or 3 * d * s.d_ffn) for s in specs)
    return (ffn / len(specs) - 8 * d**2) / (12 * d**2)


def train_flops_per_token(account_: dict, rows_per_token: float) -> float:
    """Forward and backward FLOPs per trained token, counting the work really done:
    ``rows_per_token`` = R / (B T)."""
    return 3 * (account_["flops_per_token"] + account_["memory_flops_per_row"] * rows_per_token)


def table(numbers: dict) -> str:
    """The numbers as an aligned text table."""

    def count(n: int) -> str:
        return f"{n / 1e9:.3f} B" if n >= 1e9 else f"{n / 1e6:.2f} M" if n >= 1e6 else f"{n:,}"

    def bytes_(n: float) -> str:
        if n >= 1e9:
            return f"{n / 1e9:.3f} GB"
        return f"{n / 1e6:.2f} MB" if n >= 1e6 else f"{n / 1e3:.2f} kB"

    over, residual_ = numbers["table_over_ffn"], numbers["residual"]
    rows = [("pattern", f"{numbers['pattern']}  ({numbers['layers']} layers)")]
    rows += [(label, f"{count(numbers[key]):>12}") for key, label in COUNTS.items()]
    row_bytes = f"{bytes_(numbers['row_bytes_per_token']):>12} in {numbers['row_dtype']}"
    rows += [
        ("forward FLOPs per token", f"{numbers['flops_per_token'] / 1e9:>9.3f} G"),
        ("rows read per token", row_bytes),
    ]
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        rows.append((f"table {dtype}", f"{bytes_(numbers['table_bytes'][dtype]):>12}"))
    share = "-" if over is None else f"{over:.2f}x"
    rows.append(("table over replaced FFN (values)", f"{share:>12}"))
    if residual_ is not None:
        rows.append(("FFN weights against nominal 8h^2", f"{100 * residual_:>+11.3f}% of 12h^2"))
    return "\n".join(f"{label:<34}{value}" for label, value in rows)
