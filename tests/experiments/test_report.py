"""The report on a fabricated --out folder (fabricated.py): runs finished, failed, going and
missing; experiments sound, broken and gone.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import fabricated
import pytest

from experiments import page, plots, report, summary, tables
from experiments.figure import Figure, Series
from experiments.verdicts import OURS, Claim
from flexmemory.errors import UserError

OUTPUTS = ("results.json", "report.html", "report.md", "report.tex", "summary.txt")


@pytest.fixture
def out(tmp_path):
    return fabricated.folder(tmp_path / "out")


def write(out, **changes):
    return report.write(out, modules=fabricated.modules() | changes)


def documented(begin, end):
    """The keys of a table of docs/formats.md."""
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    table = text.partition(begin)[2].partition(end)[0]
    cells = re.findall(r"^\| (`[^|]+) \|", table, re.M)
    return [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]


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
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br", "img"):
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
    said = summary.text(results).splitlines()
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
    text_of_page, text = (out / "report.html").read_text(), summary.text(results)
    for output in (text_of_page, text):
        assert "flex-b1-s1" in output and "at step 100 of 200" in output and "not started" in output
    assert (
        "OSError: disk &lt;full&gt;" in text_of_page
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
    text_of_page, text = (out / "report.html").read_text(), summary.text(results)
    assert (
        text_of_page.count("what the measure lacks") == 3
        and "experiment &#39;gone&#39;: no such file" in text_of_page
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
    parsed = Page(text)
    assert not parsed.open
    drawn = [link for link in parsed.links if link.startswith("data:image/svg+xml,")]
    outside = [link for link in parsed.links if link[:1] != "#" and link not in drawn]
    assert (
        outside
        and all((out / link).exists() for link in outside)
        and {"dense-s0/config.json", "dense-s0/metrics.jsonl"} <= set(outside)
    )
    own = re.sub("data:image[^>]+", "", text)
    assert not re.search(r"https?:|@import|url\((?!#)|<script", own)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    # two, three and three curves; the empty one is words
    assert len(drawn) == text.count("<img") == text.count(' alt="') == 8
    for link in drawn:
        svg = unquote(link.partition(",")[2])
        assert not Page(svg).open and not re.search("<script|<!|<[?]", svg)
    assert "Nothing to draw yet." in text and "15 more rows" in text
    assert text.index('id="verdicts"') < text.index('id="e1_loss_order"') < text.index('id="cost"')


def test_equal_inputs_give_equal_bytes(out):
    write(out)
    before = [(out / name).read_bytes() for name in OUTPUTS]
    write(out)
    assert before == [(out / name).read_bytes() for name in OUTPUTS]


def test_shared_runs_have_their_loss_curves_once(out):
    results = write(out)
    assert experiment(results, "e2_same_runs")["curves"] == "e1_loss_order"
    labels = [curve["label"] for curve in experiment(results, "e1_loss_order")["curves"]]
    assert labels == "dense layers-2c flex-b1 flex-b3 memoryllm stem attn-only".split()
    text = (out / "report.html").read_text()
    assert "the loss curves are there" in text and text.count("<b>Loss curves.</b>") == 3


def test_loss_curve_is_the_mean_of_the_seeds_that_came_furthest():
    seeds = [
        [{"step": 1, "loss": a}, {"step": 2, "loss": a - 1}, {"step": 2, "val_loss": a}][:rows]
        for a, rows in ((4, 3), (6, 3), (9, 1))
    ]
    assert report.mean_curve(seeds) == {"train": [(1, 5), (2, 4)], "val": [(2, 5)]}
    assert report.mean_curve([[{"step": 1}]]) == {"train": [], "val": []}


def test_variants_have_one_entry_per_model_as_documented(out):
    variants = write(out)["variants"]
    keys = documented("Of a variant", "\n#")
    assert variants and all(sorted(entry) == sorted(keys) for entry in variants)
    entries = {entry["name"]: entry for entry in variants}
    assert list(entries) == "dense layers-2c flex-b1 flex-b3 memoryllm stem attn-only".split()
    stem, memory = entries["stem"], entries["memoryllm"]
    assert stem["budget"]["chosen"] == {"model.d_ff": 344}
    assert (stem["runs"], stem["seconds"], stem["val_loss"]) == (2, 20.0, pytest.approx(2.39))
    assert (memory["table_bytes"], memory["tokens"]) == (4_194_304, 409_600)
    page = (out / "report.html").read_text()
    assert "4.0 MiB<small>float32</small>" in page and "−0.06 %" in page and "d_ff=344" in page


def test_results_have_the_documented_keys(out):
    results = write(out)
    assert sorted(results) == sorted(documented("### results.json", "Of an experiment"))
    keys = documented("Of an experiment", "Of a variant")
    assert all(sorted(entry) == sorted(keys) for entry in results["experiments"])


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
        and "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; " in text
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
    assert "NaN" not in (out / "results.json").read_text() and summary.text(results)
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
    text = summary.text(write(out))
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
    assert "missing  dense-s0: trained to step 200, measures not finished" in summary.text(results)
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


def test_summary_fits_a_terminal(out):
    write(out)
    lines = (out / "summary.txt").read_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == summary.HEAD[1].split("|")
    assert lines[3].split()[:6] == ["dense", "–", "786k", "786k", "2.310", "–"]
    assert "✓ reproduced    E1  The loss rises from dense to flex to memoryllm:" in lines
    assert "                dense→memoryllm +0.1500 ± 0.0041 nat" in lines
    assert "claims of the papers: 1 reproduced, 1 contradicted, 1 within noise, 1 not run" in lines
    assert "11 of 14 runs finished" in lines


def test_summary_and_page_show_what_was_generated_and_what_a_token_holds(out):
    texts = [
        {"model": "m", "prompt": "def <", "disk": " a\n" + "b" * 99, "live": " a\n" + "b" * 99}
    ]
    texts.append(texts[0] | {"live": "other"})
    near = [{"token": " The", "cosine": 0.354}]
    holds = [{"model": "m", "token": " the", "count": 8362, "norms": [1.5, 3.0], "nearest": near}]
    analysed = {"rows": [], "continuations": texts, "tokens": holds}
    module = fabricated.module("x", analyse=lambda runs: analysed, claims=lambda runs: [])
    write(out, e9_curves=module)
    text, page = (out / "summary.txt").read_text(), (out / "report.html").read_text()
    assert "  def <  (equal)\n    disk   a⏎bbb" in text and "  def <  (NOT EQUAL)" in text
    assert max(map(len, text.splitlines())) <= 80
    assert page.count("✓ equal") == page.count("✗ not equal") == 1 and "def &lt;" in page
    assert 'height:50.0%"></i>1.5' in page and "8,362 × in training" in page and "0.35" in page
    assert "m: tokens whose rows are nearest, by cosine\n\n  ␣the         ␣The 0.35" in text


def test_parts_of_the_time_add_up_to_what_the_launcher_waited():
    parts = {"train": 300.0, "fold": 60.0, "decode": 40.0}
    (line,) = summary.times(parts)
    assert (
        line
        == "time     of all runs: training 5 min 0 s, folding and verifying 1 min 0 s,\n"
        + ("         generation from disk 40 s")
    )
    (line,) = summary.times(parts | {"text": 3.0, "runs": 200.0, "report": 7.0})
    assert " ".join(line.split()) == (
        "time 3 min 30 s: text 3.0 s, training 2 min 30 s, folding and verifying 30 s, "
        "generation from disk 20 s, report 7.0 s"
    )
    assert summary.times({}) == []


def test_command_prints_table_and_places_and_turns_mistakes_into_one_line(out, capsys, tmp_path):
    plan = json.loads((out / "runs.json").read_text())
    (out / "runs.json").write_text(
        json.dumps(
            plan | {"experiments": [], "runs": [run | {"experiments": []} for run in plan["runs"]]}
        )
    )
    assert report.main([str(out)]) == 0
    printed = capsys.readouterr().out
    assert "11 of 14 runs finished" in printed and str(out / "report.html") in printed
    assert all(name in printed for name in OUTPUTS)
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


def looks(*series):
    keys = ("label", "style", "family", "dashed")
    return plots.looks([dict(zip(keys, values, strict=True)) for values in series])


def test_series_of_a_figure_look_different_and_families_alike():
    a, b, c = looks(
        ("a", "bars", "dense", False), ("b", "line", "flex", False), ("c", "line", "flex", False)
    )
    assert a["color"] == plots.STYLES["dense"][0] and b["color"] == c["color"]
    assert b["marker"] != c["marker"] and b["linestyle"] != c["linestyle"]
    assert (
        len({str(look) for look in looks(*((f"{i}", "line", "flex", False) for i in range(9)))})
        == 9
    )
    a, b, c = looks(
        ("a", "line", "other", False), ("b", "line", "dense", True), ("c", "line", "other", False)
    )
    assert len({look["color"] for look in (a, b, c)}) == 3 and b["linestyle"] == "--"
    assert looks(("a", "bars", "flex", False), ("a", "bars", "flex", False))[0]["marker"] == "D"


def figure(series, **options):
    return Figure("f", "t", "c", "x", "y", series, **options).to_dict()


def test_bars_that_would_look_alike_are_markers():
    """Bars start at zero; where the values lie far from it, the figure shows positions and the axis
    need not. What a tick names has no legend.
    """

    def bars(*values):
        series = [Series(f"v{i}", ((i, v, 0.01),), "bars", "flex") for i, v in enumerate(values)]
        ticks = tuple((i, f"v{i}") for i in range(len(values)))
        return plots.figure_svg(figure(tuple(series), ticks=ticks))

    filled = f'style="fill: {plots.STYLES["flex"][0]}"'
    wide, near = bars(0.2, 0.9), bars(2.30, 2.45)
    assert wide.count(filled) == 2 and not near.count(filled)
    assert wide.count("v1</text>") == 1


def test_series_that_share_a_label_are_named_once():
    pair = (Series("a", ((0, 1.0),), "points"), Series("a", ((1, 2.0),), "points"))
    assert plots.figure_svg(figure(pair)).count("a</text>") == 1


def test_cloud_of_points_stays_small():
    cloud = tuple(
        Series(
            f"cluster {c}", tuple((c + i / 1000, (i * 37 % 200) / 10) for i in range(200)), "points"
        )
        for c in range(10)
    )
    svg = plots.figure_svg(figure(cloud))
    assert len(svg) < 90_000 and all(f"cluster {c}</text>" in svg for c in range(10))


def test_description_has_the_numbers_of_a_figure():
    long = Series("long", tuple((i, i / 2) for i in range(20)))
    bars = (Series("v0", ((0, 2.5),), "bars", "flex"), long)
    text = plots.describe(figure(bars, ticks=((0, "first"),), lines=((0.9, "limit"),)))
    assert (
        text
        == "y against x; v0: first: 2.5; long (20 points): first: 0, 19: 9.5; line at 0.9: limit."
    )


def test_page_of_25_experiments_stays_below_4_mb(out):
    plan = json.loads((out / "runs.json").read_text())
    names = [f"e{i}_x" for i in range(1, 26)]
    runs = [run | {"experiments": names} for run in plan["runs"]]
    (out / "runs.json").write_text(json.dumps(plan | {"experiments": names, "runs": runs}))
    made = fabricated.modules()

    def analyse(runs):
        curves, order = fabricated.curves(runs), fabricated.loss_order(runs)
        return {"rows": curves["rows"], "figures": order["figures"] + curves["figures"]}

    claims = made["e1_loss_order"].claims
    both = fabricated.module("Both?", IDS=(), SOURCE="x", claims=claims, analyse=analyse)
    results = report.collect(out, modules=dict.fromkeys(names, both))
    one, two = (
        len(page.render(results | {"experiments": results["experiments"][:n]})) for n in (1, 2)
    )
    assert one + 24 * (two - one) < 4_000_000
