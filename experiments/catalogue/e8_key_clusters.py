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
from experiments.verdicts import entry, judge, not_run, within
from flexmemory.analysis.keys import cluster_coefficient, clusters

IDS = ("E8",)
SOURCE = "MemoryLLM Fig 5"
MEASURES = (clusters, cluster_coefficient)
SHOWN = 8  # clusters in the picture's legend, the largest


def sweep(scale):
    return scales.sweep(scale, "memoryllm")


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
    points = {}
    for x, y, cluster in sorted(found["points"], key=lambda point: min(point[2], SHOWN)):
        label = f"cluster {cluster}" if cluster < SHOWN else "others"
        points.setdefault(label, []).append((x, y))
    axes = [
        f"component {i + 1} ({share:.0%} of the variance)"
        for i, share in enumerate(found["explained"])
    ]
    figure = Figure(
        "map",
        f"Tokens by the keys they use in layer {found['layer']}",
        f"{found['k']} clusters of {runs[0]['name']}; the table names them.",
        *axes,
        tuple(Series(label, tuple(own), "points") for label, own in points.items()),
    )
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    made, paper = [], "not in the papers (no control)"
    controls = {"fresh": "a model before training", "permuted": "permuted coefficients"}
    for control, words in controls.items():
        text = f"Layer 0's coefficients cluster better than those of {words}"
        first = [entry("cluster_coefficient.layers", key) for key in ("coefficient", control)]
        found = within(runs, "memoryllm", *first)
        made.append(judge(text, paper, found, 1, "silhouette", needs="memoryllm"))
    text = "The clusters read as punctuation, names, places"
    paper = "clusters one can read (qualitative)"
    return [*made, not_run(text, paper, "a person must read the table")]
