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
    return scales.sweep(scale, "memoryllm", numbers=scales.ONE_SEED)


def analyse(runs):
    points = [run["measures"]["hit_curves"]["points"] for run in runs]
    rows = []
    for seeds in zip(*points, strict=True):
        first = seeds[0]
        row = {"share_of_rows": first["share"], "slots": first["slots"], "bytes": first["bytes"]}
        row |= {policy: mean_spread(seed[policy] for seed in seeds)[0] for policy in POLICIES}
        expected = mean_spread(seed["expected"]["lfu"] for seed in seeds)[0]
        rows.append(row | {"lfu_expected": expected})
    series = []
    for policy in POLICIES if rows else ():
        curve = tuple((100 * row["share_of_rows"], 100 * row[policy]) for row in rows)
        series.append(Series(policy, curve, dashed=policy == "clairvoyant"))
    figure = Figure(
        "hits",
        "Hit rate against the size of the cache",
        "One sequence, one token at a time, empty at first.",
        "rows that the cache holds, % of the vocabulary",
        "lookups answered, %",
        tuple(series),
        log_x=True,
        lines=((80.0, "80 %, STEM"),),
    )
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    frequent = (
        "LFU answers more than 80% of lookups (here with a quarter of the rows)",
        "more than 80% (size not given)",
    )
    fixed = (
        "The most frequent tokens, kept for good, do within two points of LFU (our limit)",
        "not in the papers (proposed, not measured)",
    )
    if not runs:
        return [not_run(*words, "needs memoryllm") for words in (frequent, fixed)]
    found = runs[0]["measures"]["hit_curves"]
    if found["cold"] > 0.2:
        short = f"the text is too short: {found['cold']:.0%} of its lookups are a row's first"
        return [not_run(*words, short) for words in (frequent, fixed)]
    quarter = next(point for point in found["points"] if point["share"] == 0.25)
    lfu, static = quarter["lfu"], quarter["static"]
    both = f"{static:.1%} against {lfu:.1%}"
    text = (
        f"of the text, whatever the model; {found['cold']:.1%} of the lookups are a row's first; at"
        f" best {quarter['clairvoyant']:.1%}"
    )
    start = "LFU begins with the training counts, which are all that the static set has"
    return [
        exact_claim(*frequent, f"{lfu:.1%}", lfu > 0.8, 1, text),
        exact_claim(*fixed, both, static > lfu - 0.02, 1, start),
    ]
