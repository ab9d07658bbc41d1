"""The promise of the seam: a new variant is one class. MeKi (arXiv 2602.03359, section 2.1
equations 1-7) as a stranger would add it.

    row = alpha * rms(M_l[id] + beta * G_l(E[id])),  G: SwiGLU D -> D/2 -> W
    x'  = A + SwiGLU(h) + rms(W_out(row + sigmoid(W_gate h))),  A = x + Attn(norm x), h = norm A

Nothing but this class and its entry in KINDS: training, labels, accounting, export and offloaded
generation must find it.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexmemory.config import ParallelConfig
from flexmemory.models.accounting import account
from flexmemory.models.blocks import KINDS, Dense
from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import RMSNorm
from flexmemory.models.memory import TABLE_BLOCK, RowSource, empty_table, take_rows
from flexmemory.models.patterns import LayerSpec
from flexmemory.models.transformer import build, init_params
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.runtime.verify import verify
from flexmemory.tkv.export import export
from flexmemory.train import host_tables
from flexmemory.train.loop import resolve, train
from flexmemory.train.step import init_state

W = 16


class MekiRows(RowSource):
    def __init__(self, cfg, layer, rngs):
        init = nnx.initializers.normal(0.1)
        self.table = empty_table(cfg, W)
        self.gate = nnx.Param(init(rngs.params(), (cfg.d_model, layer.d_memory), jnp.float32))
        self.up = nnx.Param(init(rngs.params(), (cfg.d_model, layer.d_memory), jnp.float32))
        self.down = nnx.Param(init(rngs.params(), (layer.d_memory, W), jnp.float32))
        self.norm = RMSNorm(W, cfg.norm_eps)
        self.alpha, self.beta = nnx.Param(jnp.ones(())), nnx.Param(jnp.ones(()))

    @staticmethod
    def table_std(cfg, layer):
        return 0.1

    def __call__(self, ids_R, e_RD):
        g_RW = (jax.nn.silu(e_RD @ self.gate) * (e_RD @ self.up)) @ self.down
        return self.alpha * self.norm(take_rows(self.table[...], ids_R) + self.beta * g_RW)


class Meki(Dense):
    source = MekiRows

    @classmethod
    def spec(cls, cfg, beta):
        return LayerSpec("meki", d_ffn=cfg.d_ff, d_memory=cfg.d_model // 2, row_width=W)

    def __init__(self, cfg, layer, rngs):
        super().__init__(cfg, layer, rngs)
        init = nnx.initializers.normal(cfg.init_std)
        self.gate = nnx.Param(init(rngs.params(), (cfg.d_model, W), jnp.float32))
        self.down = nnx.Param(init(rngs.params(), (W, cfg.d_model), jnp.float32))
        self.out_norm = RMSNorm(cfg.d_model, cfg.norm_eps)

    def after_attention(self, x_BTD, a_BTD, row_BTW, ctx):
        h_BTD = self.ffn_norm(a_BTD)
        meki_BTD = self.out_norm((row_BTW + jax.nn.sigmoid(h_BTD @ self.gate)) @ self.down)
        return a_BTD + ctx.scaled(self.ffn(h_BTD) + meki_BTD)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(KINDS, "meki", Meki)


def test_rows_are_the_papers_equation():
    cfg = ModelConfig(pattern="meki*2 dense", vocab_size=30, d_model=32, n_heads=4, d_ff=64)
    params = init_params(cfg, 0)
    rows_LRW = np.asarray(build(cfg)(params).rows(jnp.arange(30))[f"w{W}"])
    p, e = (
        jax.tree.map(np.asarray, params["memory"]["stacks"]["stack0"]),
        np.asarray(params["embed"]),
    )
    for layer in range(2):
        gate = e @ p["gate"][layer]
        v = (
            p["table"][layer]
            + (gate / (1 + np.exp(-gate)) * (e @ p["up"][layer])) @ p["down"][layer]
        )
        np.testing.assert_allclose(
            rows_LRW[layer],
            v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5),
            rtol=2e-5,
            atol=1e-6,
        )


def test_accounting_counts_it():
    cfg = ModelConfig(pattern="meki*2", vocab_size=30, d_model=32, n_heads=4, d_ff=64)
    numbers, plain = account(cfg), account(dataclasses.replace(cfg, pattern="dense*2"))
    assert numbers["active"] - plain["active"] == 2 * (
        2 * 32 * W + 32
    )  # W_gate, W_out and the norm after it
    assert numbers["total"] - numbers["active"] == 2 * (30 * W + 2 * 32 * 16 + 16 * W + W + 2)
    assert numbers["memory_flops_per_row"] == 2 * 2 * (2 * 32 * 16 + 16 * W)


def test_it_trains_folds_and_is_served_from_disk(tiny_config, tmp_path):
    cfg = tiny_config("dense meki*2")
    first = train(cfg, tmp_path / "run", progress=False)
    assert first["step"] == cfg.train.steps
    export(tmp_path / "run", tmp_path / "store", progress=False)
    proof = verify(tmp_path / "store", tmp_path / "run", tokens=12, prompts=2, progress=False)
    assert proof["ok"] and proof["rows_max_abs_diff"] == 0 and proof["greedy_equal"]
    assert (
        len(
            Engine(tmp_path / "store", Budgets(ram=0))
            .generate(["Question:"], 4, stop_at_eos=False)[0]
            .ids
        )
        == 4
    )


def test_its_tables_may_lie_in_the_hosts_memory(tiny_config, tmp_path, monkeypatch):
    """Also those larger than what is drawn at a time: here every block of rows is drawn alone."""
    monkeypatch.setattr(host_tables, "DRAW_BYTES", 1)
    sets = {"optimizer.table_optimizer": "lazy_adam", "model.vocab_size": 2 * TABLE_BLOCK + 40}
    cfg, _, _ = resolve(tiny_config("meki stem", **sets, **{"train.steps": 3}))
    on_host = dataclasses.replace(cfg, parallel=ParallelConfig(table_memory="host"))
    with contextlib.closing(host_tables.HostTables(on_host)) as tables:
        fresh = tables.whole(tables.state)
    params = jax.tree.leaves(fresh["params"]["tables"])
    assert sorted(float(np.std(table)).__round__(2) for table in params) == [0.06, 0.1]
    for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(init_state(cfg)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    results = [train(c, tmp_path / c.parallel.table_memory, progress=False) for c in (cfg, on_host)]
    assert results[0]["val_loss"] == results[1]["val_loss"]
