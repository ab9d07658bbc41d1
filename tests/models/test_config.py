"""Config checks: one line that names the field and the value, whatever is wrong."""

import dataclasses

import pytest

from flexmemory.config import Config, default_config, from_dict, get, load_json, parse_arg, to_json
from flexmemory.errors import UserError


def changed(path, value):
    values = default_config().to_dict()
    section, name = path.split(".")
    values[section][name] = value
    return values


def test_the_defaults_are_a_valid_config():
    assert from_dict(default_config()) == Config()
    assert from_dict({}) == Config()


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.d_model = 1


def test_json_round_trip(tmp_path):
    config = from_dict(changed("model.pattern", "(dense flex)*2") | {"optimizer": {"lr": 3e-4}})
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_json(tmp_path / "config.json") == config
    assert get(config, "optimizer.lr") == 3e-4


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        '{"model": {"dmodel": 3}}',
        "[1]",
        '{"model": {"init_std": NaN}}',
        '{"model": 3}',
    ],
)
def test_a_bad_config_file_is_a_user_error(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError):
        load_json(path)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.d_modle", 3, "did you mean 'd_model'?"),
        ("train.step", 3, "did you mean 'steps'?"),
        ("data.zzzz", 3, "known: batch_size, document_mask, path, seq_len"),
        ("model.d_model", "128", "'128' is a str, give a int"),
        ("model.d_model", 128.0, "128.0 is a float, give a int"),
        ("model.d_model", True, "True is a bool, give a int"),
        ("model.remat", 1, "1 is a int, give a bool"),
        ("optimizer.lr", True, "True is a bool, give a float"),
        ("model.pattern", None, "None is a NoneType, give a str"),
        ("optimizer.lr", float("nan"), "finite"),
        ("optimizer.lr", float("inf"), "finite"),
        ("optimizer.lr", 0.0, "above 0"),
        ("model.d_model", -8, "above 0"),
        ("model.d_model", 0, "above 0"),
        ("model.init_std", -0.1, "negative"),
        ("train.steps", -1, "negative"),
        ("model.n_kv_heads", -2, "negative"),
        ("model.attention", "flash", "'flash' is not one of auto, xla, cudnn"),
        ("model.compute_dtype", "float16", "'float16' is not one of float32, bfloat16"),
        ("model.n_heads", 3, "3 does not divide d_model 128"),
        ("model.n_kv_heads", 3, "3 does not divide n_heads 4"),
        ("model.n_kv_heads", 8, "8 does not divide n_heads 4"),
        ("model.head_dim", 5, "5 is odd"),
        ("model.pattern", "dense denze", "did you mean 'dense'?"),
        ("train.accum_steps", 3, "3 does not divide data.batch_size 16"),
        ("optimizer.b2", 1.5, "1.5"),
        ("optimizer.b1", -0.1, "-0.1"),
        ("optimizer.decay_fraction", 2.0, "2.0"),
    ],
)
def test_a_bad_field_is_named(path, value, said):
    with pytest.raises(UserError) as error:
        from_dict(changed(path, value))
    message = str(error.value)
    assert message.startswith(f"config {path}: ")
    assert said in message
    assert "\n" not in message


def test_a_section_that_is_no_section_is_named():
    for values, said in [
        ({"model": 3}, "config model"),
        ({"modle": {}}, "'model'"),
        (None, "root"),
    ]:
        with pytest.raises(UserError, match=said):
            from_dict(values)


def test_default_config_refuses_unknown_fields_and_wrong_types():
    config = default_config()
    with pytest.raises(AttributeError):
        config.model.d_modle = 3
    with pytest.raises(TypeError):
        config.model.d_model = "wide"


def test_an_integer_is_a_float():
    assert from_dict(changed("optimizer.lr", 1)).optimizer.lr == 1.0


SIZES = {"small": {"d_model": 8}, "1b": {"d_model": 2048}}


@pytest.mark.parametrize(
    ("arg", "size", "options"),
    [
        (None, "small", {"beta": "3", "layers": 4, "lr": 0.1}),
        ("", "small", {"beta": "3", "layers": 4, "lr": 0.1}),
        ("1b", "1b", {"beta": "3", "layers": 4, "lr": 0.1}),
        ("1b,beta=2.5,layers=7", "1b", {"beta": "2.5", "layers": 7, "lr": 0.1}),
        ("lr=1e-3,small", "small", {"beta": "3", "layers": 4, "lr": 1e-3}),
    ],
)
def test_parse_arg(arg, size, options):
    assert parse_arg(arg, SIZES, beta="3", layers=4, lr=0.1) == (SIZES[size], options)


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("True", True), ("False", False)]
)
def test_parse_arg_reads_a_bool(text, value):
    assert parse_arg(f"remat={text}", SIZES, remat=not value)[1] == {"remat": value}


def test_parse_arg_does_not_hand_out_its_tables():
    parse_arg("1b", SIZES)[0]["d_model"] = 0
    assert SIZES["1b"]["d_model"] == 2048


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("2b", "'2b': no such size; known: 1b, small"),
        ("betta=3", "did you mean 'beta'?"),
        ("layers=x", "layers: 'x' is not a int"),
        ("remat=maybe", "remat"),
    ],
)
def test_parse_arg_names_the_word(arg, said):
    with pytest.raises(UserError) as error:
        parse_arg(arg, SIZES, beta="3", layers=4, remat=False)
    assert said in str(error.value)
