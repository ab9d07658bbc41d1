"""Training steps of a PyTorch Llama (transformers, SDPA) beside flexmemory's dense model: same
shape, same weights, same batch, same run.

    pip install -r experiments/peers/requirements.txt
    python -m experiments.peers.torch_llama [--scale=cpu] [--rounds=3] [--out=FILE]

Both sides do forward, backward, clipping to global norm 1 and AdamW; on a GPU PyTorch runs
compiled, under bfloat16 autocast, with the fused AdamW. Rounds are taken in turn. The models are
equal parameter by parameter, so their losses at the first step agree to rounding; flexmemory's step
computes its z-loss (1e-6 of logsumexp^2) and the metrics of a run besides. Prints JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # PyTorch needs room on the same GPU

import jax
import numpy as np
import torch
import transformers

from flexmemory.bench.train import CONFIGS, ROUNDS, no_compilation_cache, prepare
from flexmemory.config import Config
from flexmemory.models.blocks import layer_specs
from flexmemory.models.parameters import join
from flexmemory.models.transformer import per_layer
from flexmemory.train.compiled import compile_step
from flexmemory.train.step import init_state, make_train_step

GOAL = {"cpu": 0.7, "cuda": 1.0}


def llama(cfg: Config, params: dict, device: str) -> transformers.LlamaForCausalLM:
    """The transformers model of a dense config, float32, holding ``params``."""
    m = cfg.model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.d_model,
            intermediate_size=m.d_ff,
            num_hidden_layers=len(layer_specs(m)),
            num_attention_heads=m.n_heads,
            num_key_value_heads=m.kv_heads,
            head_dim=m.head_width,
            max_position_embeddings=cfg.data.seq_len,
            rms_norm_eps=m.norm_eps,
            rope_theta=m.rope_base,
            tie_word_embeddings=m.tied_head,
            attn_implementation="sdpa",
            use_cache=False,
            dtype=torch.float32,
        )
    )
    weights = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not m.tied_head:
        weights["lm_head.weight"] = params["head"].T
    for i, layer in enumerate(per_layer(params, layer_specs(m))):
        at, attn = f"model.layers.{i}.", layer["attn"]
        weights |= {
            at + f"self_attn.{name}_proj.weight": np.reshape(attn[name], (m.d_model, -1)).T
            for name in "qkv"
        }
        weights |= {
            at + f"mlp.{name}_proj.weight": layer["ffn"][name].T for name in ("gate", "up", "down")
        }
        weights |= {
            at + "self_attn.o_proj.weight": np.reshape(attn["o"], (-1, m.d_model)).T,
            at + "input_layernorm.weight": layer["attn_norm"]["scale"],
            at + "post_attention_layernorm.weight": layer["ffn_norm"]["scale"],
        }
    missing = model.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}, strict=False
    )
    # a tied head has no weights of its own; anything else that is missing would be a model of
    # another shape
    assert not missing.unexpected_keys and set(missing.missing_keys) <= (
        {"lm_head.weight"} if m.tied_head else set()
    ), missing
    return model.to(device)


def torch_step(cfg: Config, model, device: str):
    """``step(batch) -> loss`` of flexmemory's own optimiser settings at the peak learning rate."""
    o, gpu = cfg.optimizer, device == "cuda"
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
        lr=o.lr,
        betas=(o.b1, o.b2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True,
    )
    amp = torch.autocast(
        "cuda", torch.bfloat16, enabled=gpu and cfg.model.compute_dtype == "bfloat16"
    )

    def forward(ids_BT, targets_BT):
        logits_BTV = model(input_ids=ids_BT).logits
        return torch.nn.functional.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets_BT.flatten()
        )

    forward = torch.compile(forward) if gpu else forward

    def step(ids_ABT, targets_ABT):
        total = 0.0
        for ids_BT, targets_BT in zip(ids_ABT, targets_ABT, strict=True):
            with amp:
                loss = forward(ids_BT, targets_BT) / len(ids_ABT)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return total

    return step


def measure(scale: str, rounds: int) -> dict:
    cfg, batch, ids = prepare(CONFIGS[scale], None)
    each, tokens, device = (
        ROUNDS[scale]["steps"],
        batch["ids"].size,
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    state = init_state(cfg)
    model = llama(cfg, join(state["params"]), device)
    counts = {
        "flexmemory": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        "torch": sum(p.numel() for p in model.parameters()),
    }
    step_torch, inputs = (
        torch_step(cfg, model, device),
        [torch.from_numpy(batch[name]).long().to(device) for name in ("ids", "targets")],
    )
    with no_compilation_cache():
        step, _ = compile_step(make_train_step(cfg), state, on_device := jax.device_put(batch))
    state, metrics = step(state, on_device)  # neither first step is timed: compilation, page faults
    losses = {"flexmemory": float(metrics["loss"]), "torch": float(step_torch(*inputs))}
    seconds = {"flexmemory": [], "torch": []}
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(each):
            state, metrics = step(state, on_device)
        jax.block_until_ready((state, metrics))
        seconds["flexmemory"].append((time.perf_counter() - began) / each)
        began = time.perf_counter()
        for _ in range(each):
            loss = step_torch(*inputs)
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds["torch"].append((time.perf_counter() - began) / each)
    ratio = [
        theirs / ours for ours, theirs in zip(seconds["flexmemory"], seconds["torch"], strict=True)
    ]
    return {
        "peer": (
            "transformers.LlamaForCausalLM, SDPA"
            + (", torch.compile, bfloat16 autocast" if device == "cuda" else ", eager")
        ),
        "scale": scale,
        "ids": ids,
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": {
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "pattern": cfg.model.pattern,
        "parameters": counts,
        "tokens_per_step": tokens,
        "first_loss": losses,
        "step_seconds": seconds,
        "tokens_per_s": {
            name: tokens / statistics.median(times) for name, times in seconds.items()
        },
        "flexmemory_over_torch": {
            "measured": statistics.median(ratio),
            "rounds": ratio,
            "goal": GOAL[device],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="cpu", choices=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="file to write the JSON to as well")
    args = parser.parse_args()
    text = json.dumps(measure(args.scale, args.rounds), indent=2)
    print(text)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
