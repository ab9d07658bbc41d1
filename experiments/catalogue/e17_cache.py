"""How large must a cache of rows be, and which policy?

MemoryLLM, section 2.3.2, proposes to keep the rows of frequent tokens at hand (Zipf) and measures nothing; STEM states more than 80% hits for LFU at an
unstated size. Here lru, lfu, and the static set of the training data's most frequent tokens, decoding the validation text one token at a time, between nothing
and the clairvoyant bound (Belady). Expected: lfu reaches 80% with a quarter of the rows; a static set does as well as lfu, so no policy is needed.

    python -m experiments.run e17 --scale=cpu         # E1's memoryllm
"""

from experiments import scales
from experiments.figure import Figure, Series
from experiments.verdicts import exact_claim, mean_spread
from flexmemory.analysis.caching import hit_curves

IDS = ("E17", "S21")
SOURCE = "MemoryLLM section 2.3.2; STEM"
MEASURES = (hit_curves,)
POLICIES = {"clairvoyant": "attn_only", "lfu": "memoryllm", "static": "flex", "lru": "stem"}


def sweep(scale):
    return scales.sweep(scale, [scales.memoryllm(scales.layers(scale))])


def analyse(runs):
    points = [run["measures"]["hit_curves"]["points"] for run in runs]
    rows, series = [], []
    for at in zip(*points, strict=True):
        rows.append(
            {
                "share_of_rows": at[0]["share"],
                "slots": at[0]["slots"],
                "bytes": at[0]["bytes"],
                **{policy: mean_spread([p[policy] for p in at])[0] for policy in POLICIES},
                "lfu_expected": mean_spread([p["expected"]["lfu"] for p in at])[0],
            }
        )
    for policy, family in POLICIES.items():
        series.append(
            Series(policy, tuple((100 * row["share_of_rows"], 100 * row[policy]) for row in rows), "line", family, dashed=policy == "clairvoyant")
        )
    figure = Figure(
        "hits",
        "Hit rate against the size of the cache",
        "One sequence, one token at a time, empty at first.",
        "rows that the cache holds, % of the vocabulary",
        "lookups answered, %",
        tuple(s for s in series if s.points),
        log_x=True,
        lines=((80.0, "80 %, STEM"),),
    )
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    quarter = [next(p for p in run["measures"]["hit_curves"]["points"] if p["share"] == 0.25) for run in runs]
    lfu, static, bound = (mean_spread([p[policy] for p in quarter])[0] for policy in ("lfu", "static", "clairvoyant"))
    missing, seeds = "needs memoryllm", len({run["seed"] for run in runs})
    return [
        exact_claim(
            "LFU answers more than 80% of lookups (here with a quarter of the rows)",
            "more than 80% (size not given)",
            f"{lfu:.1%}" if quarter else "",
            lfu > 0.8 if quarter else None,
            seeds,
            missing,
        ),
        exact_claim(
            "The most frequent tokens, kept for good, do within two points of LFU",
            "proposed, not measured",
            f"{static:.1%} against {lfu:.1%}; at best {bound:.1%}" if quarter else "",
            static > lfu - 0.02 if quarter else None,
            seeds,
            missing,
        ),
    ]
