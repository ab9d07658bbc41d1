"""Do tokens with a common meaning use the same keys of a memory layer?

MemoryLLM, section 3.1 and Figure 5 (1B, layer 0, all 128,256 tokens; k, distance and t-SNE settings
not given): k-means on the coefficients c~_k of the tokens finds groups that read as punctuation,
names, places. Here principal components in place of t-SNE, and the judgement is a number: the mean
silhouette of the clusters in layer 0 against that of a model with fresh weights and against
permuted coefficients (e9 has all layers).
Expected: groups one can name, and a silhouette above both controls.

    python -m experiments.run e8 --scale=cpu          # E1's runs
"""

from experiments import scales
from experiments.figure import Figure, Series
from experiments.verdicts import judge, not_run, number, within
from flexmemory.analysis.keys import cluster_coefficient, clusters

IDS = ("E8",)
SOURCE = "MemoryLLM Fig 5"
MEASURES = (clusters, cluster_coefficient)
SHOWN = 8  # clusters in the picture's legend, the largest


def sweep(scale):
    return scales.sweep(scale, [scales.memoryllm(scales.layers(scale))])


def analyse(runs):
    if not runs:
        return {"rows": [], "figures": []}
    found = runs[0]["measures"]["clusters"]
    rows = [
        {
            "cluster": i,
            "tokens": cluster["size"],
            "nearest to the centre": " ".join(repr(text)[1:-1] for text in cluster["examples"]),
        }
        for i, cluster in enumerate(found["clusters"])
    ]
    series = []
    for i in range(min(SHOWN, len(found["clusters"])) + 1):
        points = tuple(
            (x, y)
            for x, y, place in found["points"]
            if (place == i if i < SHOWN else place >= SHOWN)
        )
        if points:
            series.append(Series(f"cluster {i}" if i < SHOWN else "others", points, "points"))
    x, y = (
        f"component {i + 1} ({share:.0%} of the variance)"
        for i, share in enumerate(found["explained"])
    )
    return {
        "rows": rows,
        "figures": [
            Figure(
                "map",
                f"Tokens by the keys they use in layer {found['layer']}",
                f"{found['k']} clusters of {runs[0]['name']}; the table names them.",
                x,
                y,
                tuple(series),
            )
        ],
    }


def claims(runs):
    made = []
    for control, words in (
        ("fresh", "a model before training"),
        ("permuted", "permuted coefficients"),
    ):
        text = f"Layer 0's coefficients cluster better than those of {words}"
        paper = "not in the papers (no control)"
        found = within(
            runs,
            "memoryllm",
            lambda run: number(run, "measures.cluster_coefficient")["layers"][0]["coefficient"],
            lambda run, control=control: number(run, "measures.cluster_coefficient")["layers"][0][
                control
            ],
        )
        made.append(judge(text, paper, found, 1, "silhouette", needs="memoryllm"))
    return [
        *made,
        not_run(
            "The clusters read as punctuation, names, places",
            "clusters one can read (qualitative)",
            "a person must read the table",
        ),
    ]
