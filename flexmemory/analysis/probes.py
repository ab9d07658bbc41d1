"""What the FFNs and rows are worth to a trained model: they are scaled down, or left out layer by
layer, at evaluation alone.

The scale multiplies what a layer's FFN or row adds to the residual. A flex layer has both: its row
is scaled and its FFN-C stays, so that the measures say the same of its table as of a memoryllm
layer's. In a stem layer the row is inside the FFN, and both go together.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.analysis.trained import Trained, not_applicable, scores
from flexmemory.models.accounting import account

ALPHAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
NOTHING = "no layer has an FFN or a row"


def alpha(trained: Trained) -> dict:
    """The alpha-probe, MemoryLLM section 3.2, Table 1 and Fig 7: x' = x + Attn + alpha FFN in all
    layers.

    {"points": [{"alpha", and the numbers of ``scores``}]}. The paper's recall tasks are our recall
    questions, its reasoning tasks those of reasoning.
    """
    layers = _scaled_layers(trained)
    if not layers:
        return not_applicable(NOTHING)
    return {
        "applies": True,
        "points": [
            {"alpha": a, **scores(trained, ffn_scale=_scale(trained, layers, a))} for a in ALPHAS
        ],
    }


def drop_layer(trained: Trained) -> dict:
    """One layer's FFN or row left out at a time, MemoryLLM Fig 4 (perplexity) and Fig 12 (tasks).
    Of a flex layer it is the row (Fig 12), not FFN-C.

    {"whole": scores, "layers": [{"layer", "kind", "perplexity_rise": percent of the whole model's,
    scores}]}.
    """
    layers = _scaled_layers(trained)
    if not layers:
        return not_applicable(NOTHING)
    whole, rows = scores(trained, ffn_scale=_scale(trained, [], 0)), []
    for layer in layers:
        found = scores(trained, ffn_scale=_scale(trained, [layer], 0))
        rows.append(
            {
                "layer": layer,
                "kind": trained.specs[layer].kind,
                "perplexity_rise": _rise(found, whole),
                **found,
            }
        )
    return {"applies": True, "whole": whole, "layers": rows}


def drop_last(trained: Trained) -> dict:
    """The FFNs and rows of the last n layers that have one left out for good, MemoryLLM section
    2.3.2 (proposed there, not measured).

    {"table_bytes": of the whole table in bfloat16, "points": [{"dropped": n, "first": the first
    layer left out or None, "table_bytes_gone", "perplexity_rise": percent, scores}]}, n from 0 to
    all. A dense layer takes no table with it.
    """
    layers = _scaled_layers(trained)
    if not layers:
        return not_applicable(NOTHING)
    table_bytes = account(trained.cfg.model)["table_bytes"]["bfloat16"]
    points: list[dict] = []
    widths = [trained.specs[layer].row_width for layer in layers]
    for n in range(len(layers) + 1):
        kept = len(layers) - n
        found = scores(trained, ffn_scale=_scale(trained, layers[kept:], 0))
        points.append(
            {
                "dropped": n,
                "first": layers[kept] if n else None,
                "perplexity_rise": _rise(found, points[0] if points else found),
                "table_bytes_gone": table_bytes * sum(widths[kept:]) // max(1, sum(widths)),
                **found,
            }
        )
    return {"applies": True, "table_bytes": table_bytes, "points": points}


def _scaled_layers(trained: Trained) -> list[int]:
    return [layer for layer, spec in enumerate(trained.specs) if spec.row_width or spec.d_ffn]


def _scale(trained: Trained, layers: list[int], value: float) -> jax.Array:
    """scale_L: ``value`` in these layers, 1 in the others; always an array, so that all evaluations
    are one program.
    """
    scale_L = np.ones(len(trained.specs), np.float32)
    scale_L[layers] = value
    return jnp.asarray(scale_L)


def _rise(found: dict, whole: dict) -> float | None:
    """Percent by which the perplexity is above the whole model's."""
    return (
        None
        if None in (found["perplexity"], whole["perplexity"])
        else 100 * (found["perplexity"] / whole["perplexity"] - 1)
    )
