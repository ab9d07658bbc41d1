"""How do the table parameters in use grow with the length of a context?

STEM: |S| d_ff L_uniq parameters are in use over a context of L tokens, and L_uniq grows below
proportion (Heaps); no exponent is given. Expected: an exponent below 1 on the validation text.

    python -m experiments.run s18 --scale=cpu         # S3's run with a third of STEM layers
"""

from experiments import scales
from experiments.chart import mean_lines, measured
from experiments.verdicts import exact_claim, not_run, number
from flexmemory.analysis.geometry import unique_growth

IDS = ("S18",)
SOURCE = "STEM section on test-time capacity"
MEASURES = (unique_growth,)


def sweep(scale):
    return scales.sweep(scale, "stem-third", "stem-1b", scales.ONE_SEED)


def growth(run):
    points = run["measures"]["unique_growth"]["points"]
    return [(point["tokens"], point["values"]) for point in points]


def analyse(runs):
    title, x, y = "Table parameters in use", "tokens of context", "table parameters in use"
    curve = mean_lines("growth", title, runs, growth, x, y, log_x=True, log_y=True)
    rows = measured(runs[:1], "unique_growth", "points", "tokens unique lowest highest values")
    return {"rows": rows, "figures": [curve] if runs else []}


def claims(runs):
    text, paper = "Unique tokens grow below proportion", "sublinear (no exponent)"
    exponent = number(runs[0], "measures.unique_growth.exponent") if runs else None
    if exponent is None:
        return [not_run(text, paper, "needs stem-third")]
    detail = (
        "of the text, whatever the model; a finite vocabulary allows nothing else in the long run"
    )
    return [exact_claim(text, paper, f"n^{exponent:.2f}", exponent < 1, 1, detail)]
