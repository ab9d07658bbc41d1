"""Logits of every kind and switch against the NumPy forward of reference.py."""

import numpy as np
import pytest

from flexmemory.models.blocks import layer_specs

from . import reference
from .tiny import SEQUENCES, deduplicated, logits, mixed, random_params, relative_gap, tiny

TOLERANCE = 5e-6  # of the largest |logit|, float32 against float64; 2.5e-6 is the most seen


def check(cfg, kinds, betas=None, segments_BT=None, alpha=1.0, params=None):
    params = params or random_params(cfg)
    kinds = kinds.split()
    flex_betas = iter(betas or ())
    layer_betas = [next(flex_betas) if kind == "flex" else 0 for kind in kinds]
    got = logits(cfg, params, deduplicated(SEQUENCES), segments_BT=segments_BT, ffn_scale=alpha)
    want = np.stack(
        [
            reference.forward(
                cfg,
                kinds,
                layer_betas,
                params,
                layer_specs(cfg),
                ids_T,
                None if segments_BT is None else segments_BT[b],
                alpha,
            )
            for b, ids_T in enumerate(SEQUENCES)
        ]
    )
    assert want.std() > 0.5, "the reference must not be trivial"
    assert relative_gap(got, want) < TOLERANCE


@pytest.mark.parametrize(
    "kind", ["dense", "memoryllm", "stem", "stem-gate", "stem-dagger", "parallel", "attn_only"]
)
def test_kind(kind):
    check(tiny(f"{kind}*3"), f"{kind} {kind} {kind}")


@pytest.mark.parametrize("ffn_c_input", ["post_attn", "parallel"])
@pytest.mark.parametrize(
    ("ffn_c_kind", "betas"), [("swiglu", [3, 0.7, 7.5]), ("square", [1, 2, 3])]
)
def test_flex(ffn_c_kind, betas, ffn_c_input):
    cfg = tiny(
        "flex*3", beta=" ".join(map(str, betas)), ffn_c_kind=ffn_c_kind, ffn_c_input=ffn_c_input
    )
    check(cfg, "flex flex flex", betas)


MIXED_KINDS = "attn_only" + 3 * " dense memoryllm flex" + 2 * " stem stem-gate stem-dagger parallel"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"d_ff": 16},  # rows of FFNs and of tables have one width, so they share a group
        {"tied_head": True, "rope_base": 100.0, "norm_eps": 1e-2, "n_kv_heads": 1},
        {"x0_norm": "layernorm"},
        {
            "x0_norm": "layernorm",
            "x0_norm_shared": True,
            "head_dim": 6,
            "n_heads": 3,
            "n_kv_heads": 0,
        },
    ],
    ids=str,
)
def test_mixed_pattern(settings):
    check(mixed(**settings), MIXED_KINDS, [3, 3, 3])


def test_beta_per_layer():
    check(mixed(beta="3 0 1.5"), MIXED_KINDS, [3, 0, 1.5])


def test_rows_of_several_stacks_reach_their_own_layers():
    """Stacks that interleave inside a group, layers of one group that interleave inside a scanned
    unit.
    """
    unit = "flex stem memoryllm flex stem-gate"
    check(tiny(f"({unit})*2", beta="1 3 1 3", d_ff=16), f"{unit} {unit}", [1, 3, 1, 3])


def test_document_mask_and_ffn_scale():
    """Each has a test of its own in test_equalities.py."""
    segments_BT = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 7]], np.int32)
    check(mixed(), MIXED_KINDS, [3, 3, 3], segments_BT=segments_BT, alpha=0.6)
