"""Pattern and beta strings, flex widths, and the cut into scanned segments."""

import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmemory.errors import UserError
from flexmemory.models.blocks import KINDS, layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.patterns import LayerSpec, flex_widths, parse_betas, parse_pattern, segments
from flexmemory.models.transformer import abstract_params

from .tiny import tiny

WORDS = ("a", "b", "c-d")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("a", "a"),
        ("a b", "a b"),
        ("a*3", "a a a"),
        ("(a b)*2 c-d", "a b a b c-d"),
        ("c-d (a (b a)*2)*2", "c-d a b a b a a b a b a"),
        ("((a))*1", "a"),
        ("(a)(b)", "a b"),
        ("  a *\t2\n( b )  * 2 ", "a a b b"),
        ("a*2b", None),
    ],
)
def test_parse_pattern(text, layers):
    if layers is None:
        pytest.raises(UserError, parse_pattern, text, WORDS)
    else:
        assert parse_pattern(text, WORDS) == tuple(layers.split())


PATTERNS = st.recursive(
    st.sampled_from(WORDS).map(lambda word: (word, [word])),
    lambda inner: st.builds(
        lambda items, count: (
            f"({' '.join(text for text, _ in items)})*{count}",
            count * [w for _, made in items for w in made],
        ),
        st.lists(inner, min_size=1, max_size=3),
        st.integers(1, 3),
    ),
    max_leaves=6,
)


@given(PATTERNS)
def test_parse_random_pattern(pattern):
    text, layers = pattern
    assert parse_pattern(text, WORDS) == tuple(layers)


@pytest.mark.parametrize(
    ("text", "word", "position"),
    [
        ("a bb", "'bb'", 3),
        ("a (b x)*2", "'x'", 6),
        ("a,b", "'a,b'", 1),
        ("a b)", "')'", 4),
        ("a (b", "')'", 5),
        ("a () b", "empty group", 4),
        ("*2", "'*'", 1),
        ("a*2*3", "'*'", 4),
        ("a*0", "'0'", 3),
        ("a*-1", "'-1'", 3),
        ("a*1.5", "'1.5'", 3),
        ("a*b", "'b'", 3),
        ("a*", "'*'", 2),
        ("a*99999", "4096", 3),
    ],
)
def test_a_pattern_error_names_the_word_and_its_position(text, word, position):
    with pytest.raises(UserError) as error:
        parse_pattern(text, WORDS)
    message = str(error.value)
    assert "model.pattern" in message
    assert word in message
    assert f"at {position} in" in message
    assert "\n" not in message


def test_a_misspelt_kind_is_given_the_nearest():
    with pytest.raises(UserError, match="'memoryllm'"):
        parse_pattern("dense memorylm", KINDS)


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_pattern_is_named(text):
    with pytest.raises(UserError, match="empty"):
        parse_pattern(text, WORDS)


@pytest.mark.parametrize(
    "text",
    [
        "a*4096 a*4096",
        "a*" + "9" * 5000,
        "(" * 3000 + "a" + ")" * 3000,
    ],
    ids=["sum above the limit", "huge count", "deep nesting"],
)
def test_an_oversized_pattern_is_a_user_error(text):
    with pytest.raises(UserError):
        parse_pattern(text, WORDS)


def flat(cuts):
    return tuple(spec for unit, repeats in cuts for _ in range(repeats) for spec in unit)


@given(
    st.lists(
        st.sampled_from([LayerSpec("a"), LayerSpec("b"), LayerSpec("b", d_ffn=1)]),
        min_size=1,
        max_size=30,
    ).map(tuple)
)
def test_segments_reproduce_the_stack(specs):
    assert flat(segments(specs)) == specs


@given(PATTERNS, st.integers(2, 5))
def test_a_repeated_pattern_is_scanned(pattern, repeats):
    """However a unit looks inside, repeating it adds no segment that has to be compiled again."""
    specs = tuple(map(LayerSpec, pattern[1]))
    cuts = segments(specs * repeats)
    assert flat(cuts) == specs * repeats
    assert sum(len(unit) for unit, _ in cuts) <= 2 * len(specs)


@pytest.mark.parametrize(
    ("pattern", "cuts"),
    [
        ("dense*8 memoryllm*16", [("dense", 8), ("memoryllm", 16)]),
        ("(stem dense dense)*5 dense", [("stem dense dense", 5), ("dense", 1)]),
        ("dense (stem dense dense)*5", [("dense stem dense", 5), ("dense", 1)]),
        ("flex*24", [("flex", 24)]),
        ("dense", [("dense", 1)]),
    ],
)
def test_segments_of_usual_patterns(pattern, cuts):
    made = segments(tuple(map(LayerSpec, parse_pattern(pattern, KINDS))))
    assert [(" ".join(spec.kind for spec in unit), repeats) for unit, repeats in made] == cuts


def test_layers_of_different_widths_are_not_stacked():
    made = segments(layer_specs(tiny("flex*4", beta="3 3 2 2")))
    assert [repeats for _, repeats in made] == [2, 2]


@pytest.mark.parametrize(
    ("text", "count", "betas"),
    [
        ("3", 2, (3, 3)),
        ("3 2.5", 2, (3, 2.5)),
        ("0,8", 2, (0, 8)),
        ("1, 2", 2, (1, 2)),
    ],
)
def test_parse_betas(text, count, betas):
    assert parse_betas(text, count) == betas


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x", "'x' is not a number"),
        ("3 -1", "-1 is outside 0..8"),
        ("8.01", "8.01 is outside 0..8"),
        ("nan", "nan is outside 0..8"),
        ("inf", "inf is outside 0..8"),
        ("1 2", "2 values for 3 flex layers"),
        ("", "0 values for 3 flex layers"),
    ],
)
def test_a_beta_error_names_the_value(text, named):
    with pytest.raises(UserError, match=re.escape("model.beta: " + named)):
        parse_betas(text, 3)


def test_beta_errors_reach_the_model():
    with pytest.raises(UserError, match="beta"):
        tiny("flex dense flex", beta="1 2 3")
    with pytest.raises(UserError, match="square"):
        tiny("flex", beta="2.5", ffn_c_kind="square")
    with pytest.raises(UserError, match="leaves FFN-M .* use 8"):
        tiny("flex", beta="7.99")
    with pytest.raises(UserError, match="leaves FFN-C .* use 0"):
        tiny("flex", beta="0.01")


@pytest.mark.parametrize(
    ("beta", "kind", "ffn_c_input"),
    [
        ("0", "memoryllm", "post_attn"),
        ("0", "memoryllm", "parallel"),
        ("8", "dense", "post_attn"),
        ("8", "parallel", "parallel"),
    ],
)
def test_the_ends_of_beta_are_the_plain_kinds(beta, kind, ffn_c_input):
    assert layer_specs(tiny("flex", beta=beta, ffn_c_input=ffn_c_input)) == layer_specs(tiny(kind))


@given(st.integers(1, 20_000), st.integers(1, 60_000), st.floats(0, 8))
def test_flex_widths_split_d_ff(d_model, d_ff, beta):
    d_ffn, d_memory = flex_widths(d_model, d_ff, beta)
    assert d_ffn + d_memory == d_ff
    assert d_ffn >= 0 and d_memory >= 0
    assert abs(d_ffn - d_ff * beta / 8) <= 0.5 or (d_model, d_ff) in {
        (960, 2560),
        (1600, 4272),
        (2048, 5464),
    }


@pytest.mark.parametrize(
    ("d_model", "d_ff", "memory_widths"),
    [
        (960, 2560, (2560, 2240, 1920, 1600)),
        (1600, 4272, (4272, 3738, 3200, 2668)),
        (2048, 5464, (5464, 4778, 4096, 3418)),  # the printed widths of h^2 and 3h^2 swapped back
    ],
)
def test_flex_widths_of_table_5(d_model, d_ff, memory_widths):
    assert tuple(flex_widths(d_model, d_ff, beta)[1] for beta in range(4)) == memory_widths
    for beta in (1, 2, 3):
        assert flex_widths(d_model, d_ff, beta)[0] == pytest.approx(beta * d_model / 3, rel=0.01)


def parameters(pattern, **settings):
    cfg = ModelConfig(pattern=pattern, vocab_size=100, **settings)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)))


SIZES = {
    "250m": dict(d_model=960, d_ff=2560, n_heads=16),
    "750m": dict(d_model=1600, d_ff=4272, n_heads=16),
    "1b": dict(d_model=2048, d_ff=5464, n_heads=32),
    "odd": dict(d_model=50, d_ff=131, n_heads=5),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_totals_are_equal_across_the_kinds_that_are_compared(size):
    """Dense and memoryllm differ in which norm they have, not in how many; flex has both."""
    layers, d_model = 3, size["d_model"]
    total = parameters("dense*3", **size)
    assert parameters("memoryllm*3", **size) == parameters("parallel*3", **size) == total
    assert parameters("dense memoryllm*2", **size) == total
    for beta in ("1", "2", "3", "2.7", "1 2 3"):
        assert parameters("flex*3", beta=beta, **size) == total + layers * d_model
    assert parameters("flex*3", beta="0", **size) == total


@pytest.mark.parametrize("beta", ["1", "2", "3"])
def test_square_ffn_c_keeps_the_total_within_the_rounding_of_d_ff(beta):
    size = SIZES["1b"]
    off = parameters("flex*3", beta=beta, ffn_c_kind="square", **size) - parameters(
        "dense*3", **size
    )
    assert abs(off) < 0.002 * parameters("dense*3", **size)
