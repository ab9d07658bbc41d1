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

# PyTorch needs room on the same GPU
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

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
        attn, ffn = layer["attn"], layer["ffn"]
        of_layer = {f"self_attn.{n}_proj": np.reshape(attn[n], (m.d_model, -1)).T for n in "qkv"}
        of_layer |= {"self_attn.o_proj": np.reshape(attn["o"], (-1, m.d_model)).T}
        of_layer |= {f"mlp.{n}_proj": ffn[n].T for n in ("gate", "up", "down")}
        of_layer |= {"input_layernorm": layer["attn_norm"]["scale"]}
        of_layer |= {"post_attention_layernorm": layer["ffn_norm"]["scale"]}
        weights |= {f"model.layers.{i}.{name}.weight": value for name, value in of_layer.items()}
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    missing = model.load_state_dict(tensors, strict=False)
    # a tied head has no weights of its own; anything else that is missing would be a model of
    # another shape
    tied = {"lm_head.weight"} if m.tied_head else set()
    assert not missing.unexpected_keys and set(missing.missing_keys) <= tied, missing
    return model.to(device)


def torch_step(cfg: Config, model, device: str):
    """``step(batch) -> loss`` of flexmemory's own optimiser settings at the peak learning rate."""
    o, gpu = cfg.optimizer, device == "cuda"
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1]}
    norms = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    settings = {"lr": o.lr, "betas": (o.b1, o.b2), "eps": o.eps, "weight_decay": o.weight_decay}
    adamw = torch.optim.AdamW([matrices, norms], **settings, fused=True)
    low = gpu and cfg.model.compute_dtype == "bfloat16"
    amp = torch.autocast("cuda", torch.bfloat16, enabled=low)

    def forward(ids_BT, targets_BT):
        logits_NV = model(input_ids=ids_BT).logits.float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits_NV, targets_BT.flatten())

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
    each, tokens = ROUNDS[scale]["steps"], batch["ids"].size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = init_state(cfg)
    model = llama(cfg, join(state["params"]), device)
    counts = {
        "flexmemory": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        "torch": sum(p.numel() for p in model.parameters()),
    }
    torch_inputs = [torch.from_numpy(batch[n]).long().to(device) for n in ("ids", "targets")]
    step_torch, on_device = torch_step(cfg, model, device), jax.device_put(batch)
    with no_compilation_cache():
        step, _ = compile_step(make_train_step(cfg), state, on_device)

    def ours(steps: int) -> float:
        """The last loss of so many steps."""
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, on_device)
        jax.block_until_ready((state, metrics))
        return float(metrics["loss"])

    def theirs(steps: int) -> float:
        for _ in range(steps):
            loss = step_torch(*torch_inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    sides = {"flexmemory": ours, "torch": theirs}
    # neither first step is timed: compilation, page faults
    losses = {name: train(1) for name, train in sides.items()}
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, train in sides.items():
            began = time.perf_counter()
            train(each)
            seconds[name].append((time.perf_counter() - began) / each)
    ratio = [b / a for a, b in zip(seconds["flexmemory"], seconds["torch"], strict=True)]
    how = "torch.compile, bfloat16 autocast" if device == "cuda" else "eager"
    return {
        "peer": f"transformers.LlamaForCausalLM, SDPA, {how}",
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
        "tokens_per_s": {name: tokens / statistics.median(s) for name, s in seconds.items()},
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
