"""Combinators, strictness, equal budgets, and the list of a folder of runs."""

import dataclasses
import json

import fabricated_runs
import pytest

from experiments import budgets, catalogue, scales, sweeps
from experiments import runs as run_list
from experiments.sweeps import (
    chain,
    check,
    merge,
    prefix,
    product,
    seeds,
    values,
    variant_of,
    with_fields,
    zipped,
)
from experiments.verdicts import VERDICTS
from flexmemory.config import Config
from flexmemory.errors import UserError
from flexmemory.models.accounting import account

KNOWN = (  # why a claim is not run at smoke scale
    "not implemented",
    "no such block",
    "flexmemory bench decode",
    "well above chance",
    "the text is too short",
    "a person must read",
    "of its active parameters",
)
SMALL = {"model.d_model": 64, "model.d_ff": 172, "model.vocab_size": 512}


def config(pattern, **fields):
    return with_fields(Config(), SMALL | {"model.pattern": pattern} | fields)


def test_combinators():
    models = [{"name": "a", "model.beta": "1"}, {"name": "b", "model.beta": "2"}]
    made = product(models, seeds((0, 1)))
    assert [row["name"] for row in made] == ["a-s0", "a-s1", "b-s0", "b-s1"]
    assert made[3] == {"name": "b-s1", "model.beta": "2", "train.seed": 1}
    assert [row["name"] for row in prefix("x", models)] == ["x-a", "x-b"]
    assert zipped(models, values("model.d_ff", (8, 16), "f{}"))[1] == {
        "name": "b-f16",
        "model.beta": "2",
        "model.d_ff": 16,
    }
    assert chain(models, models[:1]) == [*models, models[0]]
    with pytest.raises(UserError, match="lengths 2, 1"):
        zipped(models, models[:1])
    with pytest.raises(UserError, match="model.beta is set twice, to '1' and '2'"):
        merge(*models)
    assert [variant_of(name) for name in ("flex-b3-s12", "dense@memoryllm-1b-s0", "dense")] == [
        "flex-b3",
        "dense",
        "dense",
    ]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"name": "a", "model.betta": "3"}],
            "run a sets 'model.betta': no such field; did you mean 'model.beta'?",
        ),
        ([{"name": "a", "model.beta": 3}], "run a sets model.beta: 3 is a int, give a str"),
        (
            [{"name": "a"}, {"name": "a", "train.seed": 1}],
            r"two runs are named 'a' \(train.seed differs\)",
        ),
        ([{"model.beta": "3"}], "a run named None"),
        ([{"name": "../a"}], "letters, digits"),
        ([{"name": "a", "budget": {"mode": "total"}}], "give mode, knob, like"),
        (
            [
                {
                    "name": "a",
                    "budget": {
                        "mode": "total",
                        "knob": "model.d_ff",
                        "like": {"model.patern": "dense"},
                    },
                }
            ],
            "no such field",
        ),
    ],
)
def test_a_sweep_that_is_not_sound(rows, says):
    with pytest.raises(UserError, match=says):
        check(rows)


@pytest.mark.parametrize(
    ("pattern", "mode", "knob", "like", "near"),
    [
        ("dense stem dense dense", "total", "model.d_ff", "dense*4", 0.005),
        ("dense*4", "active", "model.d_model", "memoryllm*4", 0.005),
        ("memoryllm*4", "bytes", "model.d_model", "dense*4", 0.03),
        ("memoryllm*4", "flops", "model.d_model", "dense*4", 0.08),
    ],
)
def test_a_width_is_solved_for_an_equal_budget(pattern, mode, knob, like, near):
    cfg, facts = budgets.solve(
        config(pattern), {"mode": mode, "knob": knob, "like": {"model.pattern": like}}
    )
    target = account(config(like).model, 128)[budgets.MODES[mode]]
    assert (
        facts["target"] == target and facts["got"] == account(cfg.model, 128)[budgets.MODES[mode]]
    )
    assert abs(facts["got"] / target - 1) == abs(facts["residual"]) < near
    assert facts["chosen"] == {"model.d_ff": cfg.model.d_ff, "model.d_model": cfg.model.d_model}
    for step in (-1, 1):  # no neighbouring width is nearer
        other = dataclasses.replace(cfg.model, d_ff=cfg.model.d_ff + step)
        assert abs(account(other, 128)[budgets.MODES[mode]] - target) >= abs(facts["got"] - target)


def test_a_budget_that_cannot_be_met():
    with pytest.raises(
        UserError, match="comes no nearer to 65,856 by model.d_ff"
    ):  # attention alone is as large as all of memoryllm that is active
        budgets.solve(
            config("dense*8"),
            {"mode": "active", "knob": "model.d_ff", "like": {"model.pattern": "memoryllm*4"}},
        )
    for budget, says in (
        ({"mode": "totl", "knob": "model.d_ff"}, "did you mean 'total'"),
        ({"mode": "total", "knob": "model.dff"}, "did you mean 'model.d_ff'"),
    ):
        with pytest.raises(UserError, match=says):
            budgets.solve(config("dense*4"), budget | {"like": {}})


def test_any_sweep_can_be_made_of_equal_budget():
    rows = scales.sweep("cpu", scales.models("dense memoryllm", 4))
    made = budgets.equalise(rows, "active")
    assert [row.get("budget", {}).get("mode") for row in made] == [None] * 3 + ["active"] * 3
    assert made[3]["budget"]["like"]["model.pattern"] == "dense*4"
    larger = [row | {"name": f"large-{row['name']}", "model.d_model": 96} for row in rows]
    assert [
        row.get("budget", {}).get("like", {}).get("model.d_model")
        for row in budgets.equalise(rows + larger, "active")
    ][::3] == [None, 48, None, 96]
    with pytest.raises(UserError, match="--budget 'actve': did you mean 'active'"):
        budgets.equalise(rows, "actve")


@pytest.mark.parametrize("name", catalogue.names())
def test_every_experiment_is_whole(name):
    module = catalogue.load(name)
    assert module.__doc__.strip().splitlines()[0].endswith(("?", ".")) or "?" in module.__doc__
    assert module.SOURCE and all(
        catalogue.load(identity.lower()) is module for identity in module.IDS
    )
    for scale in catalogue.scales_of(module):
        rows = catalogue.sweep_of(module, scale)
        by_variant = {}
        for row in rows:
            by_variant.setdefault(row["name"].rpartition("-s")[0], []).append(row.get("train.seed"))
        assert len({tuple(seeds) for seeds in by_variant.values()}) <= 1, "seeds are not paired"
    found = module.analyse([])
    assert isinstance(found["rows"], list) and all(figure.to_dict() for figure in found["figures"])
    claims = module.claims([])
    assert claims and (
        not rows or all(claim.verdict == "not run" and claim.detail for claim in claims)
    )


@pytest.mark.parametrize("name", catalogue.names())
def test_every_experiment_shows_and_judges_its_runs(name):
    module = catalogue.load(name)
    runs = fabricated_runs.runs_of(name, "smoke")
    shown = module.analyse(runs)
    assert shown["rows"] and all(figure.series for figure in shown["figures"])
    json.dumps([shown["rows"], [figure.to_dict() for figure in shown["figures"]]], allow_nan=False)
    claims = module.claims(runs)
    assert claims and all(claim.verdict in VERDICTS for claim in claims)
    missing = [claim.detail for claim in claims if claim.verdict == "not run"]
    assert all(any(reason in why for reason in KNOWN) for why in missing), missing
    for part in (runs[: len(runs) // 2], runs[len(runs) // 2 :]):  # while runs are going
        module.analyse(part), module.claims(part)


@pytest.mark.parametrize("scale", scales.SCALES)
def test_experiments_agree_on_the_runs_they_share(scale):
    names = [
        name for name in catalogue.names() if scale in catalogue.scales_of(catalogue.load(name))
    ]
    made = run_list.make(names, scale)
    assert len(made.runs) < sum(
        len(catalogue.sweep_of(catalogue.load(name), scale)) for name in names
    )
    assert len(made.runs["dense-s0"]["experiments"]) > 5 if scale != "paper" else made.runs
    assert all(run_list.measures_of(run) is not None for run in made.runs.values())


def test_plans_are_merged_and_a_name_keeps_its_meaning(tmp_path):
    out = tmp_path / "runs"
    run_list.claim(out, run_list.make(["e1"], "cpu", seeds=[0]))
    both = run_list.claim(out, run_list.make(["e2"], "cpu"))
    assert both.runs == run_list.read(out).runs and set(both.experiments) == {
        "e1_base_vs_memoryllm",
        "e2_flex_beta",
    }
    assert (
        both.runs["dense-s0"]["experiments"] == ["e1_base_vs_memoryllm", "e2_flex_beta"]
        and "dense-s2" in both.runs
        and "dense-active-s1" not in both.runs
    )
    for other, says in (
        (run_list.make(["e1"], "smoke"), "holds runs of scale 'cpu', not 'smoke'"),
        (
            run_list.make(["e2"], "cpu", source="tasks"),
            "two runs are named 'dense-s0': prepare.source is",
        ),
        (run_list.make(["e2"], "cpu", budget="active"), "holds runs of budget None, not 'active'"),
    ):
        with pytest.raises(UserError, match=says):
            run_list.claim(out, other)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a folder of runs"):
        run_list.claim(tmp_path / "taken", both)
    (out / "runs.json").write_text("{")
    with pytest.raises(UserError, match="runs.json: not readable"):
        run_list.read(out)


def test_a_run_counts_only_with_its_overrides_and_its_model_s_measures(tmp_path):
    run = run_list.make(["e5", "e1"], "smoke").runs["dense-s0"]
    folder = tmp_path / "dense-s0"
    (folder / "measures").mkdir(parents=True)
    trained = {
        "name": "dense-s0",
        "overrides": run["overrides"],
        "result": {"step": 4, "val_loss": 2.5},
        "seconds": {"train": 1.0},
    }
    measure = {"seconds": 3.0, "of": [4, 2.5], "result": {"applies": True}}

    def found(trained=trained, measure=measure, **more):
        for path, value in (
            (folder / "trained.json", trained),
            (folder / "measures" / "drop_layer.json", measure),
        ):
            path.write_text(value if isinstance(value, str) else json.dumps(value))
        return run_list.finished(tmp_path, run, **more)

    assert found()["measures"] == {"drop_layer": {"applies": True}} and found()["seconds"] == {
        "train": 1.0,
        "drop_layer": 3.0,
    }
    assert found()["variant"] == "dense" and found()["seed"] == 0
    assert found(trained | {"overrides": run["overrides"] | {"train.seed": 1}}) is None
    assert found(measure=measure | {"of": [4, 2.6]}) is None, "of another training"
    assert found('{"name": ') is None and found(measure="{") is None
    found()
    (folder / "measures" / "drop_layer.json").unlink()
    assert run_list.finished(tmp_path, run) is None
    assert run_list.finished(tmp_path, run, set()) is not None, (
        "an experiment without that measure has its run"
    )


def test_a_variant_that_an_experiment_has_lost_is_planned_no_more(tmp_path):
    out = tmp_path / "runs"
    made = run_list.claim(out, run_list.make(["s26"], "smoke"))
    old = {
        "name": "stem-third-decayed-s0",
        "overrides": {"train.seed": 0},
        "experiments": ["s26_table_training"],
    }
    (out / "runs.json").write_text(
        json.dumps(
            {
                "scale": "smoke",
                "experiments": ["s26_table_training", "gone"],
                "runs": [*made.runs.values(), old],
            }
        )
    )
    assert (
        run_list.claim(out, run_list.make(["s26"], "smoke", seeds=[0, 5])).runs.keys()
        == run_list.make(["s26"], "smoke", seeds=[0, 5]).runs.keys()
    )


def test_one_launcher_at_a_time(tmp_path):
    with (
        run_list.locked(tmp_path / "x"),
        pytest.raises(UserError, match="another launcher is at work there"),
        run_list.locked(tmp_path / "x"),
    ):
        pass


def test_bad_names_and_seeds():
    for names, scale, more, says in (
        (["e99"], "cpu", {}, "experiment 'e99'"),
        (["e1_base_vs_memorylm"], "cpu", {}, "did you mean 'e1_base_vs_memoryllm'"),
        (["e1"], "cpuu", {}, "did you mean 'cpu'"),
        (
            ["knowledge"],
            "cpu",
            {"source": "tasks"},
            "--source: knowledge compares texts of its own",
        ),
    ):
        with pytest.raises(UserError, match=says):
            run_list.make(names, scale, **more)
    assert sweeps.differing({"a": 1}, {"a": 1, "b": 2}) == "b"
