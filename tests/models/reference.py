"""The papers' equations in NumPy float64, one token sequence at a time: what the JAX models are
compared with.

Where the papers are silent, the Llama recipe as docs/variants.md states it: RMSNorm before
attention and FFN with parameters of their own, RoPE pairing i with i + H/2, no biases, a final
RMSNorm, X_0 the raw token embedding with a norm per layer.
"""

import numpy as np

from flexmemory.models.transformer import per_layer


def rms_norm(x, w, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * w["scale"]


def layer_norm(x, w, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w[
        "scale"
    ] + w["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, w):
    """MemoryLLM Eq 2.2: W_Down((x W_Up) * SiLU(x W_Gate))"""
    return ((x @ w["up"]) * silu(x @ w["gate"])) @ w["down"]


def square_ffn(x, w, beta):
    """FFN-C as beta D x D matrices: a linear map, up and down with SiLU between, or a SwiGLU of
    width D.
    """
    if beta == 1:
        return x @ w["down"]
    if beta == 2:
        return silu(x @ w["gate"]) @ w["down"]
    return swiglu(x, w)


def rotate(x_TH, base):
    """Position t turns the pair (x_i, x_{i + H/2}) by the angle t * base^(-2i/H)."""
    width = x_TH.shape[1]
    turned_TH = np.empty_like(x_TH)
    for t in range(len(x_TH)):
        for i in range(width // 2):
            angle = t * base ** (-2 * i / width)
            pair = complex(x_TH[t, i], x_TH[t, i + width // 2]) * np.exp(1j * angle)
            turned_TH[t, i], turned_TH[t, i + width // 2] = pair.real, pair.imag
    return turned_TH


def attention(x_TD, w, segments_T, base):
    """MemoryLLM Eq 2.1, causal and inside one document; query head n reads key/value head n * K //
    N.
    """
    length, n_heads = len(x_TD), w["q"].shape[1]
    share = n_heads // w["k"].shape[1]
    out_TD = np.zeros_like(x_TD)
    for n in range(n_heads):
        q_TH = rotate(x_TD @ w["q"][:, n], base)
        k_TH = rotate(x_TD @ w["k"][:, n // share], base)
        v_TH = x_TD @ w["v"][:, n // share]
        for t in range(length):
            seen = [s for s in range(t + 1) if segments_T[s] == segments_T[t]]
            score = k_TH[seen] @ q_TH[t] / np.sqrt(q_TH.shape[1])
            weight = np.exp(score - score.max())
            out_TD[t] += (weight / weight.sum()) @ v_TH[seen] @ w["o"][n]
    return out_TD


def memory_weights(kinds, betas, params, cfg):
    """Weights of each memory layer, None where a layer has none, from the stacked
    ``memory.stacks``.

    Layers of one row width are a group; inside it, layers of one shape share a stack, in layer
    order; stacks are numbered group by group.
    """

    def shape(kind, beta):
        if kind == "flex" and beta:
            return (cfg.d_model, kind, beta)
        if kind in ("memoryllm", "flex"):
            return (cfg.d_model, "memoryllm", 0)
        return (cfg.d_ff, kind, 0) if kind.startswith("stem") else None

    shapes = [shape(*layer) for layer in zip(kinds, betas)]
    seen = list(dict.fromkeys(s for s in shapes if s))
    widths = list(dict.fromkeys(width for width, *_ in seen))
    stacks = sorted(
        seen, key=lambda s: widths.index(s[0])
    )  # stable: first appearance inside a group
    weights = []
    for i, s in enumerate(shapes):
        weights.append(
            s and _slice(params["memory"]["stacks"][f"stack{stacks.index(s)}"], shapes[:i].count(s))
        )
    return weights


def _slice(tree, i):
    return {k: _slice(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}


def float64(tree):
    return {
        k: float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()
    }


def forward(cfg, kinds, betas, params, specs, ids_T, segments_T=None, alpha=1.0):
    """logits_TV. ``kinds`` and ``betas`` spell the layers out; alpha scales what FFN or row add
    (MemoryLLM section 3.2).
    """
    params = float64(params)
    x0_norm = {"rmsnorm": rms_norm, "layernorm": layer_norm}[cfg.x0_norm]
    x0_TD = params["embed"][ids_T]
    segments_T = np.zeros(len(ids_T)) if segments_T is None else segments_T
    x = x0_TD
    for kind, beta, w, m in zip(
        kinds,
        betas,
        per_layer(params, specs),
        memory_weights(kinds, betas, params, cfg),
        strict=True,
    ):
        attn = attention(
            rms_norm(x, w["attn_norm"], cfg.norm_eps), w["attn"], segments_T, cfg.rope_base
        )
        a = x + attn  # Xt_L of MemoryLLM section 2.1

        def normed(y, w=w):
            return rms_norm(y, w["ffn_norm"], cfg.norm_eps)

        if m and "ffn" in m:  # MemoryLLM Eq 2.4-2.5
            row = swiglu(
                x0_norm(
                    x0_TD,
                    params["memory"]["norm"] if cfg.x0_norm_shared else m["norm"],
                    cfg.norm_eps,
                ),
                m["ffn"],
            )
        elif m:
            row = m["table"][ids_T]

        if kind == "attn_only":
            x = a
        elif kind == "dense":  # MemoryLLM Eq 2.1-2.3
            x = a + alpha * swiglu(normed(a), w["ffn"])
        elif kind == "parallel":
            x = x + attn + alpha * swiglu(normed(x), w["ffn"])
        elif kind == "memoryllm" or (kind == "flex" and beta == 0):  # MemoryLLM Eq 2.6
            x = x + attn + alpha * row
        elif kind == "flex":  # MemoryLLM section 4.2
            h = normed(x if cfg.ffn_c_input == "parallel" else a)
            x = (
                a
                + (
                    square_ffn(h, w["ffn"], beta)
                    if cfg.ffn_c_kind == "square"
                    else swiglu(h, w["ffn"])
                )
                + alpha * row
            )
        elif kind == "stem":  # STEM section 1.1
            h = normed(a)
            x = a + alpha * ((silu(h @ w["gate"]) * row) @ w["down"])
        elif kind == "stem-gate":
            h = normed(a)
            x = a + alpha * ((silu(row) * (h @ w["up"])) @ w["down"])
        elif kind == "stem-dagger":  # STEM Eq 5
            h = normed(a)
            x = a + alpha * ((silu(h @ w["gate"]) * (h @ w["up"] + row)) @ w["down"])
    head_DV = params["embed"].T if cfg.tied_head else params["head"]
    return rms_norm(x, params["norm"], cfg.norm_eps) @ head_DV
