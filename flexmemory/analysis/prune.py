"""The other way to fewer active weights, MemoryLLM section 5.5 and Fig 11: a dense model whose FFN
weights are pruned after training.

Unstructured, each matrix for itself. "magnitude" keeps a matrix's largest |w|. "wanda" keeps the
largest |w_ij| |x_i| among the weights of one output j, |x_i| the 2-norm of input i over CALIBRATION
tokens of the training split; layer by layer, each with the inputs that the pruned layers before it
give. SparseGPT, the paper's third, is not done. The paper gives neither sparsity pattern nor
calibration set nor numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexmemory.analysis.trained import Trained, not_applicable, scores
from flexmemory.models.accounting import account
from flexmemory.models.attention import Context
from flexmemory.models.blocks import KINDS
from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import gated, linear
from flexmemory.models.patterns import LayerSpec
from flexmemory.models.transformer import attention_implementation, per_layer, stack_layers

KEPT = (
    1 / 8,
    2 / 8,
    3 / 8,
    0.5,
    0.75,
)  # of the FFN weights; the first three leave as many weights active as flex with beta 1, 2, 3
CALIBRATION = 16_384
MATRICES = ("gate", "up", "down")


def pruned(trained: Trained) -> dict:
    """Loss of the pruned model: {"points": [{"rule", "kept": share of FFN weights, "active":
    weights left as ``account`` counts them, scores}]}; rule "none" is the whole model.

    active at kept = beta / 8 is (4 + beta) / 12 of the whole for d_ff = 8/3 d_model: flex's with
    that beta, and memoryllm's has no FFN weight at all.
    """
    specs = trained.specs
    if any(spec.row_width for spec in specs) or not any(spec.d_ffn for spec in specs):
        return not_applicable("only a model of dense layers, some with an FFN, is pruned")
    whole = account(trained.cfg.model)["active"]
    points = [{"rule": "none", "kept": 1.0, "active": whole, **scores(trained)}]
    layers, inputs = per_layer(trained.params, trained.specs), calibration(trained)
    for kept in KEPT:
        for rule in ("magnitude", "wanda"):
            made = (
                magnitude(layers, kept)
                if rule == "magnitude"
                else wanda(trained, layers, inputs, kept)
            )
            gone = sum(
                int(jnp.sum(layer["ffn"][name] == 0))
                for layer in made
                if "ffn" in layer
                for name in MATRICES
            )
            params = trained.params | {"blocks": stack_layers(made, trained.specs)}
            points.append(
                {
                    "rule": rule,
                    "kept": kept,
                    "active": whole - gone,
                    **scores(trained, params=params),
                }
            )
    return {"applies": True, "points": points}


def magnitude(layers: list[dict], kept: float) -> list[dict]:
    return [
        (
            layer
            | {
                "ffn": {
                    name: largest(w, jnp.abs(w), kept, whole=True)
                    for name, w in layer["ffn"].items()
                }
            }
            if "ffn" in layer
            else layer
        )
        for layer in layers
    ]


def wanda(
    trained: Trained, layers: list[dict], inputs: tuple[jax.Array, np.ndarray | None], kept: float
) -> list[dict]:
    """``inputs``: of :func:`calibration`."""
    x_BTD, segments_BT = inputs
    made = []
    for spec, layer in zip(trained.specs, layers, strict=True):
        run = functools.partial(run_layer, cfg=trained.cfg.model, spec=spec)
        if "ffn" in layer:
            _, norms = run(layer, x_BTD, segments_BT)
            ffn = {
                name: largest(
                    w, jnp.abs(w) * norms["down" if name == "down" else "up"][:, None], kept
                )
                for name, w in layer["ffn"].items()
            }
            layer = layer | {"ffn": ffn}
        x_BTD, _ = run(layer, x_BTD, segments_BT)
        made.append(layer)
    return made


def calibration(trained: Trained) -> tuple[jax.Array, np.ndarray | None]:
    """(residual stream before the first layer [B, T, D], document numbers or None) of windows of
    the training split at even distances.
    """
    cfg, windows = trained.cfg, trained.train.num_windows(trained.cfg.data.seq_len)
    count = min(max(1, CALIBRATION // cfg.data.seq_len), windows)
    numbers = [i * windows // count for i in range(count)]
    ids_BT = np.stack([trained.train.window(i, cfg.data.seq_len)[:-1] for i in numbers])
    segments_BT = (
        np.stack([trained.train.segments(i, cfg.data.seq_len)[:-1] for i in numbers])
        if cfg.data.document_mask
        else None
    )
    return jnp.asarray(trained.params["embed"])[ids_BT].astype(cfg.model.compute_dtype), segments_BT


@functools.partial(jax.jit, static_argnames=("cfg", "spec"))
def run_layer(
    layer: dict,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    *,
    cfg: ModelConfig,
    spec: LayerSpec,
) -> tuple[jax.Array, dict]:
    """(x_BTD after one layer of kind dense, parallel or attn_only, {"up": |x_i| of gate's and up's
    inputs [D], "down": of down's [F]}).
    """
    block = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: KINDS[spec.kind](cfg, spec, nnx.Rngs(0)))), layer
    )
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    ctx = Context(
        positions_BT,
        segments_BT,
        1.0,
        attention_implementation(cfg, masked=segments_BT is not None),
    )
    attn_BTD, _ = block.attend(x_BTD, ctx, None)
    a_BTD = x_BTD + attn_BTD
    if not spec.d_ffn:
        return a_BTD, {}
    h_BTD = block.ffn_norm(x_BTD if block.parallel else a_BTD)
    inner_BTF = gated(linear(h_BTD, block.ffn.gate[...]), linear(h_BTD, block.ffn.up[...]))
    norms = {
        name: jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=(0, 1)))
        for name, x in (("up", h_BTD), ("down", inner_BTF))
    }
    return a_BTD + linear(inner_BTF, block.ffn.down[...]), norms


def largest(
    weight_DF: jax.Array, score_DF: jax.Array, kept: float, whole: bool = False
) -> jax.Array:
    """The weight with zeros where the score is not among the best share ``kept`` of its output's,
    or of the ``whole`` matrix's; of equal ones the first count.
    """
    score_NM = score_DF.reshape(-1, 1) if whole else score_DF
    return _first(weight_DF, score_NM, round(kept * len(score_NM)))


@jax.jit
def _first(weight_DF: jax.Array, score_NM: jax.Array, count: int) -> jax.Array:
    order_NM = jnp.argsort(-score_NM, axis=0, stable=True)
    # of each score in its column; the best is 0
    place_NM = jnp.argsort(order_NM, axis=0, stable=True)
    return jnp.where((place_NM < count).reshape(weight_DF.shape), weight_DF, 0)
