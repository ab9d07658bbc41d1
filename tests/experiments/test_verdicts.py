"""Paired differences and verdicts, against numbers worked out by hand."""

import operator
import random

import pytest

from experiments.catalogue import cm_ratio
from experiments.verdicts import (
    LOSS,
    Claim,
    Difference,
    combined,
    difference,
    exact_claim,
    judge,
    limit_claim,
    minus,
    order_claim,
    shown,
    steps_claim,
    within,
)
from flexmemory.errors import UserError


def run(variant, seed, loss, **config):
    fields = {
        "data": {"seq_len": 128, "batch_size": 16, "document_mask": False},
        "train": {"steps": 100, "seed": seed},
    }
    for path, value in config.items():
        section, field = path.split("__")
        fields[section] = fields[section] | {field: value}
    return {
        "name": f"{variant}-s{seed}",
        "variant": variant,
        "seed": seed,
        "result": {"val_loss": loss},
        "config": fields,
        "data_fingerprint": "abc",
    }


def runs(**losses):
    return [
        run(variant, seed, loss)
        for variant, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def differences(*values):
    return Difference(dict(enumerate(values)))


def test_interval_of_paired_differences_is_students():
    found = difference(runs(a=[2.10, 2.23, 2.31], b=[2.00, 2.10, 2.20]), "a", "b")
    assert found.by_seed == pytest.approx({0: 0.10, 1: 0.13, 2: 0.11})
    assert found.mean == pytest.approx(0.34 / 3) and found.std == pytest.approx(0.0152753, rel=1e-4)
    assert found.half_width() == pytest.approx(4.30265 * 0.0152753 / 3**0.5, rel=1e-4)
    assert found.sign() == 1


def test_pairing_takes_the_common_spread_out():
    """Seeds that differ by 0.1 do not hide a difference of 0.01 that each seed has."""
    made = runs(a=[2.01, 2.112, 2.211], b=[2.0, 2.1, 2.2])
    found = order_claim("a above b", "yes", made, "a > b")
    assert found.verdict == "reproduced" and found.seeds == 3


@pytest.mark.parametrize(
    ("a", "order", "verdict"),
    [
        ([2.1, 2.2, 2.3], "a > b", "reproduced"),
        ([2.1, 2.2, 2.3], "a < b", "contradicted"),
        ([2.05, 2.0, 2.25], "a > b", "within noise"),
        ([2.1], "a > b", "within noise"),
    ],
)
def test_verdicts_of_a_sign(a, order, verdict):
    assert order_claim("", "", runs(a=a, b=[2.0, 2.101, 2.2]), order).verdict == verdict


def test_within_noise_says_how_much_more_would_decide():
    """The number of seeds has the power that it states: of many draws with this mean and spread,
    about four of five are decided.
    """
    found = differences(0.02, 0.00, 0.01, -0.01)
    seeds, rng = found.seeds_to_decide(), random.Random(0)
    decided = [
        differences(*(rng.gauss(found.mean, found.std) for _ in range(seeds))).sign() == 1
        for _ in range(300)
    ]
    assert found.sign() == 0 and 0.72 < sum(decided) / len(decided) < 0.88
    claim = judge("", "", found, 1, needs="")
    assert claim.detail == f"about {seeds} seeds would decide it"
    assert "at least three" in judge("", "", differences(0.5), 1, needs="").detail
    assert "not decided by 1,000" in judge("", "", differences(1.0, -1.0001), 1, needs="").detail


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        ((1.0, 1.0, 1.0), "the same on every seed: no spread to judge by"),
        ((0.0, 0.0), "equal on every seed"),
    ],
)
def test_a_difference_without_a_spread_decides_nothing(values, detail):
    found = differences(*values)
    claim = judge("", "", found, 1, needs="")
    assert (
        found.sign() == 0
        and found.seeds_to_decide() is None
        and (claim.verdict, claim.detail) == ("within noise", detail)
    )


def test_numbers_show_two_digits_of_their_spread():
    assert shown(differences(0.00001, 0.00003), "nat") == "+0.000020 ± 0.000014 nat"
    assert shown(differences(-80.0, -140.0), "bits") == "−110 ± 42 bits"
    assert shown(differences(0.0234), "") == "+0.023"


@pytest.mark.parametrize(
    "there",
    [
        ("layers-c1", "memoryllm"),
        ("dense", "layers-c5", "layers-c1", "memoryllm"),
        ("dense", "memoryllm"),
    ],
)
def test_an_order_is_judged_over_every_planned_variant_or_not_at_all(there):
    made = runs(**{variant: [2.0 + i, 2.1 + i, 2.3 + i] for i, variant in enumerate(there)})
    order = cm_ratio.claims(
        [run | {"account": {"ffn_widths": [(128, 0)] * 6, "residual": 0.0}} for run in made]
    )[0]
    assert order.verdict == "not run" and "layers-c3" in order.detail


def test_order_needs_every_step_and_one_decided_step_down_contradicts():
    good = {"a": [1.0, 1.1, 1.2], "b": [1.1, 1.201, 1.3], "c": [1.2, 1.3, 1.401]}
    assert order_claim("", "", runs(**good), "a < b < c").verdict == "reproduced"
    assert order_claim("", "", runs(**good), "b < a < c").verdict == "contradicted"
    claim = order_claim("", "", runs(**good | {"c": [1.05, 1.3, 1.301]}), "a < b < c")
    assert claim.verdict == "within noise" and "b→c" in claim.detail
    assert order_claim("", "", runs(a=[1.0]), "a < b < c").verdict == "not run"


def test_steps_are_reproduced_one_by_one_and_contradicted_together():
    """t with two degrees of freedom: 4.3 at 95%, 7.6 at 98.3%, one step of three."""
    spread = (0.02, 0.06, 0.10)  # t = 2.6

    def step(mean_over_error):
        return differences(*(mean_over_error / 3**0.5 + (value - 0.06) / 0.04 for value in spread))

    assert steps_claim("", "", {"x": step(5), "y": step(5), "z": step(9)}).verdict == "reproduced"
    assert steps_claim("", "", {"x": step(5), "y": step(4), "z": step(9)}).verdict == "within noise"
    assert (
        steps_claim("", "", {"x": step(-5), "y": step(5), "z": step(9)}).verdict == "within noise"
    )
    assert (
        steps_claim("", "", {"x": step(-8), "y": step(5), "z": step(9)}).verdict == "contradicted"
    )
    assert (
        steps_claim("", "", {"x": differences()}).verdict
        == steps_claim("", "", {}).verdict
        == "not run"
    )


def test_a_limit_needs_an_interval_below_it():
    def claim(values):
        return limit_claim(
            "",
            "",
            [run("a", seed, value) for seed, value in enumerate(values)],
            "a",
            lambda r: r["result"]["val_loss"],
            1.0,
        )

    assert (
        claim([0.8, 0.81, 0.82]).verdict == "reproduced"
        and claim([0.8, 0.81, 0.82]).ours == "0.8100 ± 0.0100 nat"
    )
    assert claim([1.2, 1.21, 1.22]).verdict == "contradicted"
    assert claim([0.5, 0.9, 1.0]).verdict == claim([0.1]).verdict == "within noise"
    assert claim([]).verdict == "not run"


def test_numbers_of_several_variants_are_combined_by_seed():
    three = runs(a=[3.0, 5.0], b=[2.0, 2.0], c=[1.9, 1.0, 7.0])
    sides = [(variant, LOSS) for variant in "abc"]
    found = combined(three, sides, lambda a, b, c: abs(a - b) - abs(b - c))
    assert found.by_seed == pytest.approx({0: 0.9, 1: 2.0})
    assert combined(three, [("a", LOSS), ("d", LOSS)], operator.sub) == differences()
    with pytest.raises(UserError, match="cannot be compared"):
        difference([*three[:1], run("b", 0, 1.0) | {"data_fingerprint": "other"}], "a", "b")


def test_missing_inputs_are_not_run():
    needs = "needs a and b of one seed"
    for made in (
        runs(a=[1.0]),
        [run("a", 0, 1.0), run("b", 1, 1.0)],  # other seeds are no pair
        runs(a=[None], b=[1.0]),
    ):
        assert order_claim("", "", made, "a > b") == Claim("", "", "", "not run", 0, needs)
    assert exact_claim("", "", "", False, 1).verdict == "contradicted"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data_fingerprint": "other"}, "data fingerprint is 'abc' and 'other'"),
        ({"config": run("b", 0, 1, data__seq_len=64)["config"]}, "data.seq_len is 128 and 64"),
        ({"config": run("b", 0, 1, train__steps=50)["config"]}, "train.steps is 100 and 50"),
        ({"config": run("b", 0, 1, train__seed=5)["config"]}, "train.seed is 0 and 5"),
    ],
)
def test_runs_that_saw_other_batches_are_not_compared(change, says):
    with pytest.raises(UserError, match=f"a-s0 and b-s0 cannot be compared: {says}"):
        difference([run("a", 0, 1.0), run("b", 0, 1.0) | change], "a", "b")


def test_differences_of_differences_and_within_one_model():
    assert minus(Difference({0: 3.0, 1: 5.0}), Difference({1: 1.0, 2: 1.0})) == Difference({1: 4.0})
    assert minus(differences(), differences(1.0)) == differences()
    both = [entry | {"x": 3.0, "y": 1.0 if entry["seed"] else None} for entry in runs(a=[1.0, 1.0])]
    assert within(both, "a", "x", lambda r: r["y"]) == Difference({1: 2.0})


def test_a_verdict_is_one_of_four():
    with pytest.raises(ValueError, match="verdict 'maybe'"):
        Claim("", "", "", "maybe", 1)
