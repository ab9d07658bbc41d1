"""The report on a fabricated --out folder (fabricated.py): runs finished, failed, going and
missing; experiments sound, broken and gone.
"""

import json
import re
from html.parser import HTMLParser

import fabricated
import pytest

from experiments import plots, report, report_page, tables
from experiments.figure import Figure, Series
from experiments.verdicts import OURS, Claim
from flexmemory.errors import UserError

OUTPUTS = ("results.json", "report.html", "report.md", "report.tex")


@pytest.fixture
def out(tmp_path):
    return fabricated.folder(tmp_path / "out")


def write(out, **changes):
    return report.write(out, modules=fabricated.modules() | changes)


def experiment(results, name):
    return next(entry for entry in results["experiments"] if entry["name"] == name)


class Page(HTMLParser):
    """Collects ids, the references that a browser would follow, and whether every element is
    closed.
    """

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.ids += [value for key, value in attributes if key == "id"]
        self.links += [
            value
            for key, value in attributes
            if key in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_results_say_of_each_experiment_what_ran_and_what_it_means(out):
    write(out)
    results = json.loads((out / "results.json").read_text())
    first = experiment(results, "e1_loss_order")
    assert (results["expected"], results["finished"], results["scale"], results["steps"]) == (
        14,
        11,
        "cpu",
        [200],
    )
    assert (first["ids"], first["source"], first["scale"]) == (["E1"], "MemoryLLM Table 2", "cpu")
    assert first["question"] == "Is the loss ordered as the ratio?"
    assert (first["expected"], len(first["finished"])) == (14, 11)
    assert (first["failed"], first["missing"]) == (["flex-b1-s1"], ["memoryllm-s1", "attn-only-s1"])
    assert (
        first["seeds"] == [0, 1]
        and len(first["claims"]) == 3
        and [figure["name"] for figure in first["figures"]] == ["order", "share"]
    )
    assert results["verdicts"] == {
        "reproduced": 1,
        "contradicted": 1,
        "within noise": 1,
        "not run": 1,
    }
    assert results["environment"]["versions"] == {"jax": "0.11.1", "flax": "0.12.8"}
    assert experiment(results, "e9_curves")["figures"][3]["series"][0]["points"] == [
        [1.0, None],
        [None, 1.0],
    ]


def test_seeds_that_a_verdict_lacks_are_named_and_our_questions_are_counted_apart(out):
    few = [
        Claim("Of one seed", "2.35 ppl", "+0.1 nat", "within noise", 1, "one seed"),
        Claim("Of both", OURS, "+0.1 nat", "reproduced", 2, "± 0.1"),
    ]
    module = fabricated.module(
        "Whose?", IDS=("E1",), analyse=lambda runs: {}, claims=lambda runs: few
    )
    results = write(out, e1_loss_order=module)
    assert [claim["detail"] for claim in experiment(results, "e1_loss_order")["claims"]] == [
        "one seed; 1 of 2 planned seeds (1 runs failed)",
        "± 0.1",
    ]
    said = report.headline(results).splitlines()
    assert "claims of the papers: 0 reproduced, 0 contradicted, 1 within noise, 1 not run" in said
    assert "questions of ours: 1 reproduced, 0 contradicted, 0 within noise, 0 not run" in said
    assert "1 of 2 planned seeds" in (out / "report.tex").read_text()


def test_experiment_sees_its_finished_runs_in_the_plans_order(out):
    seen = []
    write(
        out,
        e9_curves=fabricated.module(
            "x",
            MEASURES=(fabricated.alpha,),
            analyse=lambda runs: seen.extend(runs) or {"rows": []},
            claims=lambda runs: [],
        ),
    )
    assert [(run["name"], run["variant"], run["seed"]) for run in seen] == [
        ("dense-s0", "dense", 0),
        ("memoryllm-s0", "memoryllm", 0),
        ("dense-s1", "dense", 1),
    ]
    assert (
        seen[0]["measures"]["alpha"] == {"losses": [2.3, 2.4]}
        and seen[0]["config"]["model"]["pattern"] == "dense*4"
    )


def test_failed_and_missing_runs_are_named_and_nothing_of_the_machine_is(out):
    results = write(out)
    assert [run["name"] for run in results["failed"]] == ["flex-b1-s1"] and '"…/x.py"' in results[
        "failed"
    ][0]["error"]
    assert [
        (run["name"], run["step"], run["steps"], run["begun"]) for run in results["missing"]
    ] == [("memoryllm-s1", 100, 200, True), ("attn-only-s1", None, 200, False)]
    page, text = (out / "report.html").read_text(), report.headline(results)
    for output in (page, text):
        assert "flex-b1-s1" in output and "at step 100 of 200" in output and "not started" in output
    assert (
        "OSError: disk &lt;full&gt;" in page
        and "FAILED   flex-b1-s1 (exit 1): OSError: disk <full>" in text
    )
    for output in (text, *((out / name).read_text() for name in OUTPUTS)):
        assert not any(
            word in output
            for word in ("/home", "someone", "somehost", "987654321", str(out.parent))
        )


def test_broken_and_lost_experiments_do_not_take_the_report_down(out):
    results = write(out)
    lacks = "KeyError: 'what the measure lacks, at …/x.py'"
    assert experiment(results, "s17_broken")["errors"] == {"analyse": lacks, "claims": lacks}
    assert experiment(results, "gone")["errors"] == {"file": "experiment 'gone': no such file"}
    page, text = (out / "report.html").read_text(), report.headline(results)
    assert (
        page.count("what the measure lacks") == 3
        and "experiment &#x27;gone&#x27;: no such file" in page
    )
    assert "ERROR    gone (file)" in text and "✓ reproduced" in text


def test_unknown_experiment_of_the_catalogue_is_named(out):
    plan = json.loads((out / "runs.json").read_text()) | {"experiments": ["e999_gone"]}
    (out / "runs.json").write_text(
        json.dumps(plan | {"runs": [run | {"experiments": ["e999_gone"]} for run in plan["runs"]]})
    )
    results = report.write(out)
    assert "e999_gone" in results["experiments"][0]["errors"]["file"] and results["finished"] == 11


def test_page_is_one_well_formed_file_with_relative_links_only(out):
    write(out)
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not page.open
    outside = [link for link in page.links if not link.startswith("#")]
    assert (
        outside
        and all((out / link).exists() for link in outside)
        and {"dense-s0/config.json", "dense-s0/metrics.jsonl"} <= set(outside)
    )
    assert not re.search(r"https?:|@import|url\((?!#)|<script", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert (
        text.count('role="img"') == text.count("<desc") == 8
    )  # two, three and three curves; the empty one is words
    assert "Nothing to draw yet." in text and "15 more rows" in text
    assert text.index('id="verdicts"') < text.index('id="e1_loss_order"') < text.index('id="cost"')


def test_equal_inputs_give_equal_bytes(out):
    write(out)
    before = [(out / name).read_bytes() for name in OUTPUTS]
    write(out)
    assert before == [(out / name).read_bytes() for name in OUTPUTS]


def test_shared_runs_have_their_loss_curves_once(out):
    results = write(out)
    curves = report.curves(out, results)
    assert curves["e2_same_runs"] == "e1_loss_order" and [
        curve["label"] for curve in curves["e1_loss_order"]
    ] == ["dense", "layers-2c", "flex-b1", "flex-b3", "memoryllm", "stem", "attn-only"]
    text = (out / "report.html").read_text()
    assert "the loss curves are there" in text and text.count("<b>Loss curves.</b>") == 3


def test_loss_curve_is_the_mean_of_the_seeds_that_came_furthest():
    seeds = [
        [{"step": 1, "loss": a}, {"step": 2, "loss": a - 1}, {"step": 2, "val_loss": a}][:rows]
        for a, rows in ((4, 3), (6, 3), (9, 1))
    ]
    (curve,) = report.mean_curves(
        [("flex-b3", "flex", metrics) for metrics in seeds] + [("begun", "other", [{"step": 1}])]
    )
    assert curve == {
        "family": "flex",
        "label": "flex-b3",
        "train": [(1, 5), (2, 4)],
        "val": [(2, 5)],
    }


def test_accounting_has_one_entry_per_model(out):
    entries = {entry["variant"]: entry for entry in write(out)["accounting"]}
    assert list(entries) == [
        "dense",
        "layers-2c",
        "flex-b1",
        "flex-b3",
        "memoryllm",
        "stem",
        "attn-only",
    ]
    assert (
        entries["stem"]["budget"]["chosen"] == {"model.d_ff": 344}
        and entries["stem"]["n"] == 2
        and entries["stem"]["seconds"] == 20.0
    )
    assert (
        entries["memoryllm"]["table_bytes"] == 4_194_304
        and entries["memoryllm"]["tokens"] == 409_600
    )
    page = (out / "report.html").read_text()
    assert "4.0 MiB<small>float32</small>" in page and "−0.06 %" in page and "d_ff=344" in page


def test_generated_text_is_escaped_everywhere(out):
    evil = "<b><script>alert('x')</script> & $x_1$ | \x00 \ud83d \\input{a} 100%"
    figure = Figure(
        evil,
        evil,
        evil,
        evil,
        evil,
        (Series(evil, ((1, 2), (2, 3)), "line"), Series(evil, ((1, 2),), "points")),
        ticks=((1, evil),),
    )
    evil_module = fabricated.module(
        evil,
        IDS=(evil,),
        SOURCE=evil,
        analyse=lambda runs: {"rows": [{evil: evil, "b": [evil]}], "figures": [figure]},
        claims=lambda runs: [Claim(evil, evil, evil, "reproduced", 1, evil)],
    )
    write(out, e9_curves=evil_module)
    text = (out / "report.html").read_text()
    assert (
        not Page(text).open
        and "<script" not in text
        and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; " in text
        and "\x00" not in text
    )
    tex = (out / "report.tex").read_text()
    assert (
        r"\textless{}script\textgreater{}" in tex
        and r"\$x\_1\$" in tex
        and r"\textbackslash{}input\{a\} 100\%" in tex
    )
    assert (
        "\\<script\\>" in (out / "report.md").read_text()
        and r"\| " in (out / "report.md").read_text()
    )


def test_values_that_are_null_or_nan_do_not_break(out):
    for path in out.glob("*/trained.json"):
        hollow = {
            "account": None,
            "budget": None,
            "result": {"val_loss": float("nan")},
            "seconds": None,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | hollow))
    seen = []
    series = (
        Series("s", ((0, 1), (1, 0), (2, -1), (3, 4)), "line"),
        Series("b", ((3, 0, float("nan")),), "bars"),
    )
    results = write(
        out,
        e1_loss_order=fabricated.module(
            "x",
            claims=lambda runs: [],
            analyse=lambda runs: (
                seen.extend(runs)
                or {
                    "rows": [{"a": float("inf"), "b": None, "a_std": 1.0}, {"a": 1.5}],
                    "figures": [Figure("f", "t", "c", "x", "y", series, log_x=True, log_y=True)],
                }
            ),
        ),
    )
    assert results["finished"] == 11 and seen[0]["result"]["val_loss"] is None
    assert "NaN" not in (out / "results.json").read_text() and report.headline(results)
    assert "not drawn" not in (out / "report.html").read_text()


def test_folder_that_has_only_begun(out):
    for path in [*out.glob("*/trained.json"), *out.glob("*/failed.json")]:
        path.unlink()
    results = write(out)
    assert (
        results["finished"] == 0
        and len(results["missing"]) == 14
        and len(experiment(results, "e1_loss_order")["claims"]) == 3
    )
    assert "No run has finished yet" in (out / "report.html").read_text()
    for path in out.glob("*/metrics.jsonl"):
        path.unlink()
    text = report.headline(write(out))
    assert (
        "missing  13 not started: dense-s0, flex-b1-s0" in text
        and "missing  memoryllm-s1: begun, no step yet" in text
    )


def test_run_counts_as_finished_only_when_whole_of_this_plan_and_measured(out):
    (out / "dense-s0" / "trained.json").write_text('{"name": ')
    other = json.loads((out / "stem-s0" / "trained.json").read_text())
    (out / "stem-s0" / "trained.json").write_text(
        json.dumps(other | {"overrides": {"train.steps": 7}})
    )

    def spectra(trained):
        raise NotImplementedError

    results = write(
        out,
        e9_curves=fabricated.module(
            "x", MEASURES=(spectra,), analyse=lambda runs: {}, claims=lambda runs: []
        ),
    )
    missing = {run["name"]: run for run in results["missing"]}
    assert set(missing) == {
        "dense-s0",
        "dense-s1",
        "stem-s0",
        "memoryllm-s0",
        "memoryllm-s1",
        "attn-only-s1",
    }
    assert "missing  dense-s0: trained to step 200, measures not finished" in report.headline(
        results
    )
    assert len(experiment(results, "e1_loss_order")["finished"]) == 9, (
        "what one experiment lacks does not take the run from another"
    )


def test_several_folders_on_one_page(out, tmp_path):
    other = fabricated.folder(tmp_path / "elsewhere" / "gpu")
    planned = json.loads((other / "runs.json").read_text()) | {"scale": "gpu"}
    (other / "runs.json").write_text(json.dumps(planned))
    results = report.write(out, other, modules=fabricated.modules())
    assert (results["scale"], results["expected"], results["finished"]) == ("cpu, gpu", 28, 22)
    first, second = (
        experiment(results, "e1_loss_order"),
        experiment(results, "e1_loss_order in gpu"),
    )
    assert (first["scale"], second["scale"]) == ("cpu", "gpu") and first["claims"] == second[
        "claims"
    ]
    assert results["verdicts"] == {
        "reproduced": 2,
        "contradicted": 2,
        "within noise": 2,
        "not run": 2,
    }
    page = (out / "report.html").read_text()
    for link in re.findall(r'href="([^"#]+/config.json)"', page):
        assert (out / link).exists(), link
    assert "elsewhere/gpu/dense-s0/config.json" in page and str(tmp_path) not in page


def test_headline_fits_a_terminal(out):
    lines = report.headline(write(out)).splitlines()
    assert max(map(len, lines)) == 120
    assert lines[2].startswith("The loss rises from dense to flex to memoryllm   E1") and lines[
        2
    ].endswith("✓ reproduced")
    assert (
        "claims of the papers: 1 reproduced, 1 contradicted, 1 within noise, 1 not run" in lines
        and "11 of 14 runs finished" in lines
    )


def test_command_prints_table_and_places_and_turns_mistakes_into_one_line(out, capsys, tmp_path):
    plan = json.loads((out / "runs.json").read_text())
    (out / "runs.json").write_text(
        json.dumps(
            plan | {"experiments": [], "runs": [run | {"experiments": []} for run in plan["runs"]]}
        )
    )
    assert report.main([str(out)]) == 0
    printed = capsys.readouterr().out
    assert "11 of 14 runs finished" in printed and all(
        str(out / name) in printed for name in OUTPUTS
    )
    for bad in (tmp_path / "nowhere", out / "dense-s0"):
        assert report.main([str(bad)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(bad) in error and error.count("\n") == 1
    (out / "runs.json").write_text("{")
    with pytest.raises(UserError, match="runs.json"):
        report.collect(out)


def test_tables_as_markdown_and_latex(out):
    write(out)
    markdown, latex = (out / "report.md").read_text(), (out / "report.tex").read_text()
    assert (
        "| dense | 2 | 2.300 ± 0.012 | yes | – |" in markdown
        and "| --- | ---: | ---: |" in markdown
    )
    assert all(
        line.count(" |") == markdown.splitlines()[6].count(" |")
        for line in markdown.splitlines()[6:12]
    )
    assert (
        r"{dense} & {2} & {2.300 $\pm$ 0.012}" in latex
        and r"{dense$\to$memoryllm +0.1500 $\pm$ 0.0041 nat}" in latex
    )
    for environment in set(re.findall(r"\\begin\{(\w+)\}", latex)):
        assert latex.count(rf"\begin{{{environment}}}") == latex.count(rf"\end{{{environment}}}")
    bare = re.sub(r"\\[{}]", "", latex)
    assert bare.count("{") == bare.count("}") and latex.isascii()
    assert tables.escape_latex("naïve Łódź ąß日\x00") == "naïve Łódź [U+0105]ß[U+65E5][U+0000]"
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    head = next(i for i, line in enumerate(body) if line.startswith("{claim}"))
    assert {line.count(" & ") for line in body[head : head + 5]} == {5}


@pytest.mark.parametrize(
    "value, spread, text",
    [
        (2.34567, None, "2.346"),
        (0.5, None, "0.5"),
        (12345.6, None, "12,346"),
        (1.5e-7, None, "1.500e−07"),
        (-0.02, None, "−0.02"),
        (None, None, "–"),
        (True, None, "yes"),
        (1234567, None, "1,234,567"),
        (2.3, 0.0123, "2.300 ± 0.012"),
        (2.3, 0.00001, "2.300 ± 1e−05"),
        (123456.0, 7654.3, "123,456 ± 7,654"),
        (0.0, 0.0, "0 ± 0"),
        ([1, "a"], None, "1, a"),
    ],
)
def test_numbers_in_words(value, spread, text):
    assert tables.cell(value, spread) == text


def test_columns_of_rows_that_differ():
    head, cells, numeric = tables.grid(
        [
            {"variant": "a", "loss": 2.5, "loss_std": 0.1, "family": "dense"},
            {"variant": "b", "n": 3},
        ]
    )
    assert (
        head == ["variant", "loss", "n"]
        and cells == [["a", "2.500 ± 0.100", "–"], ["b", "–", "3"]]
        and numeric == [False, True, True]
    )


def test_labels_at_an_edge_are_pushed_apart_and_stay_inside():
    from experiments.plot_labels import spread

    placed = spread([10, 10.5, 11, 40, 99], gap=10, low=0, high=100)
    assert all(b - a >= 10 - 1e-9 for a, b in zip(placed, placed[1:], strict=False))
    assert min(placed) >= 0 and max(placed) <= 100 and placed[3] == 40


def test_series_that_a_legend_could_not_tell_apart_take_the_palette():
    def looks(*series):
        keys = ("label", "style", "family", "dashed")
        return plots.choose_looks(
            [dict(zip(keys, values, strict=True)) for values in series], list(range(len(series)))
        )

    assert looks(("a", "bars", "dense", False), ("b", "bars", "flex", False)) == ["dense", "flex"]
    assert looks(("a", "bars", "flex", False), ("b", "bars", "flex", False)) == ["c0", "c1"]
    assert looks(("a", "line", "flex", False), ("b", "line", "flex", True)) == ["flex", "flex"]
    assert looks(
        ("a", "line", "other", False), ("b", "line", "dense", False), ("c", "line", "other", False)
    ) == ["c0", "dense", "c1"]
    assert looks(("a", "line", "other", False)) == ["other"]


def figure(series, **options):
    return Figure("f", "t", "c", "x", "y", series, **options).to_dict()


def test_bars_that_would_look_alike_are_markers():
    """Bars start at zero; where the values lie far from it, the figure shows positions and the axis
    need not.
    """

    def bars(*values):
        return plots.drawn(
            "f",
            figure(
                tuple(
                    Series(f"v{i}", ((i, v, 0.01),), "bars", "flex") for i, v in enumerate(values)
                ),
                ticks=tuple((i, f"v{i}") for i in range(len(values))),
            ),
        )

    wide, legend = bars(0.2, 0.9)
    near, _ = bars(2.30, 2.45)
    filled = r'<path d="[^"]+z"[^>]*style="fill: var\(--flex\)"'
    assert not legend and len(re.findall(filled, wide)) == 2 and not re.findall(filled, near)


def test_cloud_of_points_stays_small_and_whole():
    cloud = tuple(
        Series(
            f"cluster {c}", tuple((c + i / 1000, (i * 37 % 200) / 10) for i in range(200)), "points"
        )
        for c in range(10)
    )
    svg, legend = plots.drawn("f", figure(cloud))
    assert len(svg) < 90_000 and [label for _, _, label in legend] == [
        f"cluster {c}" for c in range(10)
    ]
    dots = [
        len(re.findall("h0", path))
        for path in re.findall(r'<path d="([^"]+)"[^>]*stroke-linecap: round', svg)
    ]
    assert dots == [200] * 10


def test_page_of_25_experiments_stays_below_4_mb(out):
    plan = json.loads((out / "runs.json").read_text())
    names = [f"e{i}_x" for i in range(1, 26)]
    (out / "runs.json").write_text(
        json.dumps(
            plan
            | {
                "experiments": names,
                "runs": [run | {"experiments": names} for run in plan["runs"]],
            }
        )
    )
    made = fabricated.modules()
    both = fabricated.module(
        "Both?",
        IDS=(),
        SOURCE="x",
        claims=made["e1_loss_order"].claims,
        analyse=lambda runs: {
            "rows": fabricated.curves(runs)["rows"],
            "figures": (
                fabricated.loss_order(runs)["figures"] + (fabricated.curves(runs)["figures"])
            ),
        },
    )
    results = report.collect(out, dict.fromkeys(names, both))
    one, two = (
        len(report_page.page(results | {"experiments": results["experiments"][:n]}, {}))
        for n in (1, 2)
    )
    assert one + 24 * (two - one) < 4_000_000


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_of_a_label_can_be_read_on_its_paper(dark):
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(
            w * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
            for w, v in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
        )

    named = plots.colours(dark)
    paper = light(named["paper"])
    for name in named.keys() - {"paper", "rule"}:
        low, high = sorted((light(named[name]), paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
    assert len(set(plots.colours(False).values())) == len(
        named
    )  # colours become variables by their value
