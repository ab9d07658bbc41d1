"""How much of the FFN must compute on the context, and how much may be read from a table?

Two ways to move the ratio C/M at equal total parameters: beta = 0..3 of every layer's 8h^2 (flex,
MemoryLLM section 4.2), and n_C of N layers dense near the input, the rest memoryllm near the
output. Ends: dense (all C) and attn_only (no FFN at all, so fewer parameters: what memoryllm is
without its rows). stem stands beside them, its width solved for equal totals. Every run is also
folded, proved equal to its store, and decoded from disk.

    python -m experiments.run cm_ratio --scale=quickstart --out=runs/demo   # make demo: 6 minutes

The paper's claim at equal totals (Table 2, Figure 9): loss rises from dense over flex beta 3, 2, 1
to memoryllm; E2 judges it, with more seeds. The second way is not in the paper and is judged here.
"""

from experiments import scales
from experiments.catalogue.e12_fold_and_decode import stores_claim
from experiments.chart import compute_share, family, loss_against, mean_of, means, noise_of
from experiments.figure import Figure, Series
from experiments.measures import decode, fold, tokens
from experiments.verdicts import LOSS, by_variant, means_at, number, order_claims

IDS = ("CM",)
SOURCE = "MemoryLLM section 4.2; ours"
SCALES = ("smoke", "quickstart", "cpu", "gpu", "paper")
MEASURES = (fold, decode, tokens)


def splits(n):
    """How many of n layers are dense where the first are and the rest is memoryllm."""
    return sorted({max(1, n // 4), n // 2, n - max(1, n // 4)}, reverse=True)


def sweep(scale):
    n = scales.layers(scale)
    dense, *others = scales.models(
        "dense flex-b3 flex-b2 flex-b1 memoryllm stem-third attn_only", n
    )
    others[4] |= {"name": "stem-equal"} | scales.equal("total", "model.d_ff", f"dense*{n}")
    layers = [scales.variant(f"layers-c{c}", f"dense*{c} memoryllm*{n - c}") for c in splits(n)]
    return scales.sweep(scale, [dense, *layers, *others])


def analyse(runs):
    rows = means(
        runs,
        "account.total account.active result.val_loss result.recall_acc result.reasoning_acc"
        " result.train_tokens_per_s measures.fold.rows_max_abs_diff"
        " measures.fold.logits_max_abs_diff",
        compute_share=compute_share,
        bits_per_byte="result.val_bits_per_byte",
        table_bytes="account.table_bytes.float32",
        decode_resident="measures.decode.resident",
        decode_offloaded="measures.decode.offloaded",
    )
    costs = [loss_against(runs, cost) for cost in ("active", "read_bytes_per_token")]
    figures = [loss_against_share(runs), *costs, recall_against_reasoning(runs)]
    return {"rows": rows, "figures": figures} | best_memory(runs)


def best_memory(runs):
    """Generated text and rows of tokens of the run with rows that has the lowest loss."""
    own = [run for run in runs if number(run, "account.row_bytes_per_token")]
    if not own:
        return {}
    best = min(own, key=lambda run: number(run, LOSS) or float("inf"))
    shown = {"continuations": "measures.decode.continuations", "tokens": "measures.tokens.tokens"}
    return {
        what: [{"model": best["variant"]} | entry for entry in number(best, path) or ()]
        for what, path in shown.items()
    }


def loss_against_share(runs):
    """The two ways as lines between the same ends, the rest as reference lines."""

    def way(label, kind, **style):
        own = [run for run in runs if run["variant"].startswith((kind, "dense", "memoryllm"))]
        points = means_at((100 * compute_share(run), number(run, LOSS)) for run in own)
        return Series(label, points, family=kind, **style)

    ways = way("β of every layer", "flex"), way("first layers dense", "layers", dashed=True)
    most = 1.1 * max((y for way in ways for _, y, _ in way.points), default=0)
    others = by_variant([run for run in runs if compute_share(run) is None])
    beside = {name: mean_of(group, LOSS)[0] for name, group in others.items()}
    return Figure(
        "loss-share",
        "Validation loss against the C/M ratio",
        "Solid: β moves weights of every layer between FFN-C and FFN-M; dashed: the first layers"
        " are dense. Both ways share their ends, memoryllm and dense. Bar: standard deviation"
        " between seeds.",
        "compute share C of the FFN weights, %",
        "validation loss, nat per token",
        tuple(way for way in ways if way.points),
        lines=tuple((y, name) for name, y in beside.items() if y is not None and y < most),
        noise=noise_of(runs),
    )


def recall_against_reasoning(runs):
    series = []
    for name, group in by_variant(runs).items():
        recall, reasoning = (mean_of(group, f"result.{t}_acc")[0] for t in ("recall", "reasoning"))
        if recall is not None and reasoning is not None:
            point = (100 * reasoning, 100 * recall)
            series.append(Series(name, (point,), "points", family(group[0])))
    return Figure(
        "recall-reasoning",
        "Recall against reasoning",
        "Facts seen in training against tasks solved in the context.",
        "reasoning in the context, % right",
        "recall of trained facts, % right",
        tuple(series),
    )


def claims(runs):
    n = len(runs[0]["account"]["ffn_widths"]) if runs else scales.layers("cpu")
    layers = " < ".join(f"layers-c{c}" for c in splits(n))
    asked = {
        f"dense < {layers} < memoryllm": (
            "Loss rises as fewer of the first layers are dense",
            "not in the papers",
        ),
        "memoryllm < attn_only": (
            "Rows are worth their parameters: MemoryLLM beats attention alone",
            "not in the papers",
        ),
    }
    text = "Served from disk, every model with rows gives its resident logits and text"
    paper = "exact up to storage precision (section 4.1)"
    served = stores_claim(text, paper, runs, lambda proof: proof["ok"], "equal")
    return [*order_claims(runs, asked), served]
