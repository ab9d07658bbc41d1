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
    bytes_each, learned = DTYPE_BYTES[cfg.compute_dtype], [spec for spec in specs if spec.learned]
    return {
        "pattern": cfg.pattern,
        "layers": len(specs),
        "total": total,
        "active": active,
        "embed": embed,
        "total_all": total + embed,
        "active_all": active + embed,
        "paper_total": total + embed + sum(spec.replaces for spec in learned) if learned else total,
        "paper_active": active + embed if learned else active,
        "flops_per_token": round(flops),
        "memory_flops_per_row": 2 * matmul_weights(backbone.get("memory", {})),
        "row_bytes_per_token": row_values * bytes_each,
        "read_bytes_per_token": (
            (active + cfg.d_model * (cfg.vocab_size + 1) + row_values) * bytes_each
        ),
        "row_dtype": cfg.compute_dtype,
        "table_bytes": {
            name: int(cfg.vocab_size * row_values * n) for name, n in DTYPE_BYTES.items()
        },
        "table_over_ffn": cfg.vocab_size * row_values / replaced if replaced else None,
        "ffn_widths": [[spec.d_ffn, spec.d_memory] for spec in specs],
        "residual": residual(cfg, specs),
    }


def residual(cfg: ModelConfig, specs: tuple[LayerSpec, ...]) -> float | None:
    """How far rounding moves the FFN weights (FFN-C and FFN-M together) from the papers' nominal 8
    D^2 per layer, as a share of a layer's 12 D^2. None where the pattern has layers of another form
    (stem, attn_only)."""
    if not all(spec.nominal for spec in specs):
        return None
    ffn = sum(
        3 * cfg.d_model * spec.d_memory
        + (spec.square * cfg.d_model**2 or 3 * cfg.d_model * spec.d_ffn)
        for spec in specs
    )
    return (ffn / len(specs) - 8 * cfg.d_model**2) / (12 * cfg.d_model**2)


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

    lines = [f"{'pattern':<34}{numbers['pattern']}  ({numbers['layers']} layers)"]
    for key, what in (
        ("total", "total, no embeddings or head"),
        ("active", "active, no embeddings or head"),
        ("embed", "embedding + head"),
        ("total_all", "total, all"),
        ("active_all", "active, all"),
        ("paper_total", "total as the paper counts"),
        ("paper_active", "active as the paper counts"),
    ):
        lines.append(f"{what:<34}{count(numbers[key]):>12}")
    lines.append(f"{'forward FLOPs per token':<34}{numbers['flops_per_token'] / 1e9:>9.3f} G")
    lines.append(
        f"{'rows read per token':<34}{bytes_(numbers['row_bytes_per_token']):>12} in"
        f" {numbers['row_dtype']}"
    )
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        lines.append(f"{'table ' + dtype:<34}{bytes_(numbers['table_bytes'][dtype]):>12}")
    over = numbers["table_over_ffn"]
    lines.append(
        f"{'table over replaced FFN (values)':<34}{'-' if over is None else f'{over:.2f}x':>12}"
    )
    if numbers["residual"] is not None:
        lines.append(
            f"{'FFN weights against nominal 8h^2':<34}{100 * numbers['residual']:>+11.3f}% of 12h^2"
        )
    return "\n".join(lines)
