"""What a logit may depend on, measured by gradients: exactly zero where the design says never.

One Jacobian per kind gives the influence of every embedding row and of every memory row on every
position. The ids repeat, so that sharing a row between positions is covered: an id may influence
position t from its first occurrence on.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.models.blocks import KINDS
from flexmemory.models.transformer import build

from .tiny import deduplicated, random_params, tiny

IDS_T = np.array([7, 3, 9, 3, 11, 7, 2, 5])
BATCH = deduplicated(IDS_T[None], padding=[20, 21])
OCCURS_TR = IDS_T[:, None] == BATCH.unique_R
KNOWN_TR = np.maximum.accumulate(OCCURS_TR)  # id r stands at or before t

CASES = {kind: tiny(f"{kind}*2") for kind in KINDS} | {
    "flex-parallel": tiny("flex*2", ffn_c_input="parallel"),
    "flex-square": tiny("flex*2", ffn_c_kind="square"),
}


@functools.cache
def influence(cfg):
    """(max |d logits_t / d embed[r]| as TR, the same for the memory rows as {group: LTR}), r over
    the unique ids.
    """
    merge, params = build(cfg), random_params(cfg)
    probe_V = np.random.default_rng(2).standard_normal(cfg.vocab_size).astype(np.float32)
    shift = jax.tree.map(jnp.zeros_like, merge(params).rows(BATCH.unique_R))

    @jax.jit
    @jax.jacrev
    def jacobian(inputs):
        model = merge(params | {"embed": inputs["embed"]})
        rows = jax.tree.map(jnp.add, model.rows(BATCH.unique_R), inputs["shift"])
        return model(BATCH.ids_BT, rows, BATCH.inverse_BT)[0] @ probe_V

    made = jacobian({"embed": params["embed"], "shift": shift})
    by_id_TV = np.abs(made["embed"]).max(-1)
    others = np.setdiff1d(np.arange(cfg.vocab_size), IDS_T)
    assert not by_id_TV[:, others].any(), (
        "an id that does not occur, padding included, influences nothing"
    )
    return by_id_TV[:, BATCH.unique_R], {
        g: np.abs(j).max(-1).transpose(1, 0, 2) for g, j in made["shift"].items()
    }


@pytest.mark.parametrize("case", CASES)
def test_the_future_has_no_influence_and_the_past_has(case):
    embed_TR, rows = influence(CASES[case])
    np.testing.assert_array_equal(embed_TR != 0, KNOWN_TR)
    for rows_LTR in rows.values():
        assert not rows_LTR[:, ~KNOWN_TR].any()
        np.testing.assert_array_equal(
            rows_LTR[0] != 0,
            KNOWN_TR,
            err_msg="attention above the first memory layer spreads its rows",
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].source])
def test_a_row_of_the_last_layer_reaches_only_its_own_token(kind):
    """No attention follows the last layer's row, so it shows whose row each token was given."""
    _, rows = influence(CASES[kind])
    (rows_LTR,) = rows.values()
    np.testing.assert_array_equal(rows_LTR[-1] != 0, OCCURS_TR)


def test_without_attention_above_a_token_sees_its_own_row_only():
    _, rows = influence(tiny("memoryllm"))
    np.testing.assert_array_equal(rows["w16"][0] != 0, OCCURS_TR)
