"""How large must a cache of rows be, and which policy?

MemoryLLM, section 2.3.2, proposes to keep the rows of frequent tokens at hand (Zipf) and measures
nothing; STEM states more than 80% hits for LFU at an unstated size. Here lru, lfu, and the static
set of the training data's most frequent tokens, decoding the validation text one token at a time,
between nothing and the clairvoyant bound (Belady). Expected: lfu reaches 80% with a quarter of the
rows; a static set does as well as lfu, so no policy is needed.

    python -m experiments.run e17 --scale=cpu         # E1's memoryllm
"""

from experiments import scales
from experiments.figure import Figure, Series
from experiments.verdicts import exact_claim, mean_spread, not_run
from flexmemory.analysis.caching import hit_curves

IDS = ("E17", "S21")
SOURCE = "MemoryLLM section 2.3.2; STEM"
MEASURES = (hit_curves,)
POLICIES = ("clairvoyant", "lfu", "static", "lru")


def sweep(scale):
    return scales.sweep(scale, [scales.memoryllm(scales.layers(scale))], numbers=scales.ONE_SEED)


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
    for policy in POLICIES:
        series.append(
            Series(
                policy,
                tuple((100 * row["share_of_rows"], 100 * row[policy]) for row in rows),
                dashed=policy == "clairvoyant",
            )
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
    found = runs[0]["measures"]["hit_curves"] if runs else None
    texts = (
        (
            "LFU answers more than 80% of lookups (here with a quarter of the rows)",
            "more than 80% (size not given)",
        ),
        (
            "The most frequent tokens, kept for good, do within two points of LFU (our limit)",
            "not in the papers (proposed, not measured)",
        ),
    )
    missing = (
        "needs memoryllm"
        if found is None
        else f"the text is too short: {found['cold']:.0%} of its lookups are a row's first"
    )
    if found is None or found["cold"] > 0.2:
        return [not_run(text, paper, missing) for text, paper in texts]
    quarter = next(point for point in found["points"] if point["share"] == 0.25)
    lfu, static, bound = (quarter[policy] for policy in ("lfu", "static", "clairvoyant"))
    detail = (
        f"of the text, whatever the model; {found['cold']:.1%} of the lookups are a row's first; at"
        f" best {bound:.1%}"
    )
    return [
        exact_claim(*texts[0], f"{lfu:.1%}", lfu > 0.8, 1, detail=detail),
        exact_claim(
            *texts[1],
            f"{static:.1%} against {lfu:.1%}",
            static > lfu - 0.02,
            1,
            detail="LFU begins with the training counts, which are all that the static set has",
        ),
    ]
