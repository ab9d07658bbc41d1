"""The report on a fabricated sweep folder: two seeds of a few variants, one run failed, one still going, one not started."""

import json
import re
from html.parser import HTMLParser

import pytest

from experiments import plots, report
from flexmemory.errors import UserError

KEYS = ("name", "pattern", "beta", "seed", "total", "active", "val_loss", "recall_acc", "reasoning_acc", "train_tokens_per_s", "table_bytes",
        "export_s", "rows_max_abs_diff", "logits_max_abs_diff", "greedy_equal", "decode_tps_resident", "decode_tps_offloaded")
# name, axis, pattern, beta, C share, validation loss of seed 0
RUNS = [("dense", "end", "dense*4", None, 1.0, 2.30), ("flex-b1", "beta", "flex*4", 1, 0.125, 2.40), ("flex-b3", "beta", "flex*4", 3, 0.375, 2.34),
        ("layers-2c", "layers", "dense*2 memoryllm*2", None, 0.5, 2.35), ("memoryllm", "end", "memoryllm*4", None, 0.0, 2.45),
        ("stem", "stem", "(stem dense)*2", None, None, 2.38), ("attn-only", "end", "attn_only*4", None, None, 2.70)]


def variant(run, loss, **changes):
    memory = run["pattern"] not in ("dense*4", "attn_only*4")
    return {**run, "total": 786_432, "active": 262_144 + int(524_288 * (run["c_fraction"] or 0)), "total_all": 900_000, "active_all": 400_000,
            "val_loss": loss, "val_bits_per_byte": loss / 2, "recall_acc": 0.3, "recall_chance": 0.02, "reasoning_acc": 0.5, "reasoning_chance": 0.125,
            "kinds": {"copy": 0.6, "1-hop": 0.4}, "train_tokens_per_s": 9000.0, "rows_per_token": 0.2, "flops_per_token": 2.1e6,
            "row_bytes_per_token": 2048 if memory else None, "table_bytes": 4_194_304 if memory else None, "table_over_ffn": 2.0 if memory else None,
            "export_s": 1.5 if memory else None, "rows_max_abs_diff": 0.0 if memory else None, "logits_max_abs_diff": 2e-6 if memory else None,
            "logits_max_rel_diff": 2e-7 if memory else None, "greedy_equal": True if memory else None,
            "ok": True if memory else None, "decode_tps_resident": 120.0,
            "decode_tps_offloaded": 110.0 if memory else None, "cache_hit_rate": 0.9 if memory else None, "prompt": "def ", "sample": "def main(self):",
            "steps": 200, "tokens": 409_600, "seconds": {"train": 20.0, "eval": 2.0}, "device": "cpu", "status": "done", **changes}


def metrics(folder, loss, steps=200):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": s, "loss": loss + 3 / s, "tokens_per_s": 9000.0} for s in range(1, steps + 1, 5)]
    rows += [{"step": s, "val_loss": loss + 2.5 / s} for s in range(50, steps + 1, 50)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')  # cut by a kill


@pytest.fixture
def sweep(tmp_path):
    """OUT with 14 runs listed: flex-b1-s1 failed, memoryllm-s1 is at step 96, attn-only-s1 has no folder."""
    out, listed = tmp_path / "demo", []
    for seed in (0, 1):
        for name, axis, pattern, beta, share, loss in RUNS:
            run = {"name": f"{name}-s{seed}", "axis": axis, "pattern": pattern, "beta": beta, "c_fraction": share, "seed": seed}
            listed.append(run)
            if run["name"] == "attn-only-s1":
                continue
            metrics(out / run["name"], loss, steps=100 if run["name"] == "memoryllm-s1" else 200)
            (out / run["name"] / "run.json").write_text(json.dumps({"platform": "cpu", "git": "abc", "versions": {"jax": "0.11.1"}}))
            if run["name"] == "flex-b1-s1":
                (out / run["name"] / "failed.json").write_text(json.dumps(
                    {"name": run["name"], "stage": "export", "error": 'File "/home/someone/flexmemory/x.py", line 3\nOSError: disk <full>'}))
            elif run["name"] != "memoryllm-s1":
                (out / run["name"] / "variant.json").write_text(json.dumps(variant(run, loss + 0.02 * seed * (2 if name == "flex-b3" else 1))))
    (out / "sweep.json").write_text(json.dumps({"experiment": "cm_ratio", "scale": "quickstart", "source": "/home/someone/texts", "tokenizer": "byte",
                                                "steps": 200, "runs": listed}))
    return out


class Page(HTMLParser):
    """Collects ids, the references that a browser would follow, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.open, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.ids += [value for key, value in attributes if key == "id"]
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "action", "data")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_results_have_every_key_per_run_and_mean_and_spread_per_variant(sweep):
    report.write(sweep)
    results = json.loads((sweep / "results.json").read_text())
    assert len(results["variants"]) == 11 and results["expected"] == 14
    assert all(key in entry for entry in results["variants"] for key in KEYS)
    summary = {entry["variant"]: entry for entry in results["summary"]}
    assert summary["flex-b3"]["n"] == 2 and summary["flex-b3"]["seeds"] == [0, 1]
    assert summary["flex-b3"]["val_loss"] == pytest.approx(2.36)
    assert summary["flex-b3"]["val_loss_std"] == pytest.approx(0.04 / 2**0.5)
    assert summary["flex-b3"]["delta_dense"] == pytest.approx(0.05)  # (0.04 + 0.06) / 2, seed against the same seed
    assert summary["flex-b3"]["delta_dense_std"] == pytest.approx(0.02 / 2**0.5)
    assert summary["memoryllm"]["n"] == 1 and summary["memoryllm"]["val_loss_std"] is None
    assert summary["dense"]["equal"] is None and summary["stem"]["equal"] is True
    assert [entry["label"] for entry in results["summary"]] == ["dense", "2C+2M", "β=3", "β=1", "memoryllm", "stem", "attn-only"]
    assert results["environment"] == {"platform": "cpu", "git": "abc", "versions": {"jax": "0.11.1"}}


def test_failed_and_missing_runs_are_named_and_no_folder_of_the_machine_is(sweep):
    results = report.write(sweep)
    assert [run["name"] for run in results["failed"]] == ["flex-b1-s1"]
    assert [(run["name"], run["step"]) for run in results["missing"]] == [("memoryllm-s1", 100), ("attn-only-s1", None)]
    page, text = (sweep / "report.html").read_text(), report.headline(results)
    for output in (page, text):
        assert "flex-b1-s1" in output and "at step 100 of 200" in output and "not started" in output
    assert "OSError: disk &lt;full&gt;" in page and "OSError: disk <full>" in text
    for output in (page, text, (sweep / "results.json").read_text()):
        assert "/home" not in output and "someone" not in output and str(sweep.parent) not in output
    assert '"…/x.py"' in results["failed"][0]["error"]


def test_page_is_one_well_formed_file_without_references(sweep):
    report.write(sweep)
    text = (sweep / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert text.count('role="img"') == 4 and text.count("<desc") == 4
    assert "A single seed cannot decide" in text


def test_equal_inputs_give_equal_bytes(sweep):
    report.write(sweep)
    before = [(sweep / name).read_bytes() for name in ("results.json", "report.html")]
    report.write(sweep)
    assert before == [(sweep / name).read_bytes() for name in ("results.json", "report.html")]


def test_generated_text_is_escaped(sweep):
    path = sweep / "stem-s0" / "variant.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompt": "<b>", "sample": "<b><script>alert('x')</script> & \x00"}))
    report.write(sweep)
    text = (sweep / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; " in text
    assert '<span class="prompt">&lt;b&gt;</span>&lt;script' in text and "\x00" not in text


def test_values_that_are_null_or_nan_do_not_break(sweep):
    needed = ("name", "axis", "pattern", "beta", "c_fraction", "seed")
    for path in sweep.glob("*/variant.json"):
        entry = json.loads(path.read_text())
        path.write_text(json.dumps({key: value if key in needed else None for key, value in entry.items()}))
    results = report.write(sweep)
    assert len(results["variants"]) == 11 and all(entry["val_loss"] is None for entry in results["summary"])
    assert report.headline(results)
    path = sweep / "stem-s0" / "variant.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "val_loss": float("nan"), "table_bytes": 3 * 2**20}))
    report.write(sweep)
    assert "NaN" not in (sweep / "results.json").read_text() and "3.0 MiB" in (sweep / "report.html").read_text()


def test_sweep_that_has_only_begun(sweep):
    for path in [*sweep.glob("*/variant.json"), *sweep.glob("*/failed.json")]:
        path.unlink()
    results = report.write(sweep)
    assert not results["variants"] and len(results["missing"]) == 14
    assert "No run has finished yet" in (sweep / "report.html").read_text()
    for path in sweep.glob("*/metrics.jsonl"):
        path.unlink()
    assert "not started" in report.headline(report.write(sweep))


def test_variant_file_that_is_cut_short_counts_as_missing_and_a_mended_failure_as_done(sweep):
    (sweep / "dense-s0" / "variant.json").write_text('{"name": ')
    run = json.loads((sweep / "sweep.json").read_text())["runs"][8]
    (sweep / "flex-b1-s1" / "variant.json").write_text(json.dumps(variant(run, 2.4)))
    results = report.collect(sweep)
    assert not results["failed"] and "dense-s0" in [entry["name"] for entry in results["missing"]]
    assert "flex-b1-s1" in [entry["name"] for entry in results["variants"]]


def test_sweep_file_of_the_runner(sweep):
    """Source and tokenizer under data, config settings per run, a failure with an exit code in place of a stage."""
    spec = json.loads((sweep / "sweep.json").read_text())
    spec["data"] = {key: spec.pop(key) for key in ("source", "tokenizer")}
    spec.pop("steps")
    spec["runs"] = [{**run, "sets": {"train.steps": 200}} for run in spec["runs"]]
    (sweep / "sweep.json").write_text(json.dumps(spec))
    (sweep / "flex-b1-s1" / "failed.json").write_text(json.dumps({"name": "flex-b1-s1", "exit": -9, "error": ""}))
    results = report.write(sweep)
    assert (results["source"], results["tokenizer"], results["steps"]) == ("…/texts", "byte", 200)
    assert all("sets" not in entry for entry in results["variants"] + results["missing"])
    assert "FAILED   flex-b1-s1 (exit -9): no message" in report.headline(results)


def test_loss_curve_is_the_mean_of_the_seeds_that_came_furthest():
    run = {"axis": "beta", "pattern": "flex*4", "beta": 3, "c_fraction": 0.375, "name": "flex-b3-s0"}
    seeds = [[{"step": 1, "loss": a}, {"step": 2, "loss": a - 1}, {"step": 2, "val_loss": a}][: 3 if full else 1] for a, full in ((4, 1), (6, 1), (9, 0))]
    (curve,) = report.curves([(run, metrics) for metrics in seeds])
    assert curve == {"family": "flex", "label": "β=3", "train": [(1, 5), (2, 4)], "val": [(2, 5)]}


def test_store_that_differs_is_marked(sweep):
    path = sweep / "stem-s0" / "variant.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "greedy_equal": False, "ok": False}))
    results = report.write(sweep)
    assert "✗ differs" in (sweep / "report.html").read_text() and " NO" in report.headline(results)


def test_command_prints_table_and_place_and_turns_mistakes_into_one_line(sweep, capsys, tmp_path):
    assert report.main([str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert "flex-b3" in printed and "2.360 ±0.028" in printed and f"report: {sweep / 'report.html'}" in printed
    assert "chance: recall 2.0 %, reasoning 12.5 %" in printed
    for bad in (tmp_path / "nowhere", sweep / "dense-s0"):
        assert report.main([str(bad)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: sweep folder") and error.count("\n") == 1
    (sweep / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="sweep.json"):
        report.collect(sweep)


def test_labels_at_an_edge_are_pushed_apart_and_stay_inside():
    placed = plots.spread([10, 10.5, 11, 40, 99], gap=10, low=0, high=100)
    assert all(b - a >= 10 - 1e-9 for a, b in zip(placed, placed[1:], strict=False))
    assert min(placed) >= 0 and max(placed) <= 100 and placed[3] == 40
