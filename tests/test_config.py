import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parofx.calibration.recipes import RECIPES
from parofx.config import CalibrationConfig, ParoConfig
from parofx.errors import ConfigError, ParoError, one_per_line

calibrations = st.builds(
    CalibrationConfig,
    recipe=st.sampled_from(tuple(RECIPES)),
    steps=st.integers(0, 1000),
    learning_rate=st.floats(1e-6, 1.0),
    rows=st.integers(1, 4096),
    pairs=st.sampled_from(("matching", "greedy")),
    clip_ratios=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=5).map(tuple),
    rounding=st.sampled_from(("nearest", "feedback")),
    damping=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3).map(tuple),
    sweeps=st.integers(0, 5),
    transform_epochs=st.integers(0, 20),
    weight_epochs=st.integers(0, 20),
    tune_epochs=st.integers(0, 20),
    tune_learning_rate=st.floats(1e-6, 1.0),
    transform_learning_rate=st.floats(1e-6, 1.0),
    weight_learning_rate=st.floats(1e-6, 1.0),
    grid_learning_rate=st.floats(1e-6, 1.0),
    block_loss=st.sampled_from(("relative", "smooth_l1")),
    objective=st.sampled_from(("range", "ldl")),
    row_weights=st.sampled_from(("relative", "equal")),
    autocast=st.booleans(),
    validation_samples=st.integers(0, 64),
    seed=st.integers(0, 2**31),
    seqlen=st.integers(2, 4096),
    samples=st.integers(1, 512),
    batch_size=st.integers(1, 64),
    bits_budget=st.none() | st.floats(0.5, 16),
    work_dir=st.none() | st.text(min_size=1, max_size=8),
    resume=st.booleans(),
)
configs = st.builds(
    ParoConfig,
    bits=st.sampled_from((3, 4, 8)),
    lm_head=st.sampled_from(("float", 4, 8)),
    group_size=st.sampled_from((128, 64, 32)),
    krot=st.integers(0, 32),
    modules_to_not_convert=st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple),
    share_siblings=st.none() | st.booleans(),
    mixed_group_size=st.booleans(),
    calibration=calibrations,
)


@given(configs)
def test_round_trip_through_json(config):
    assert ParoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(calibrations)
def test_calibration_round_trip_through_json(config):
    assert CalibrationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_are_the_papers_format():
    config = ParoConfig()
    assert (config.bits, config.group_size, config.krot) == (4, 128, 8)
    assert config.calibration == CalibrationConfig()


def test_an_option_that_is_not_given_is_the_recipes():
    names = {item.name for item in dataclasses.fields(CalibrationConfig)}
    for recipe, options in RECIPES.items():
        config = CalibrationConfig(recipe=recipe)
        assert {name: getattr(config, name) for name in options} == options
        assert set(options) <= names
        assert all(getattr(config, name) is not None for name in names - {"work_dir", "bits_budget"})
    paper = CalibrationConfig(recipe="paper", samples=7)
    assert (paper.samples, paper.seqlen, paper.steps, paper.rounding) == (7, 2048, 0, "nearest")
    assert paper.trains_blocks
    assert not CalibrationConfig().trains_blocks


def test_the_objective_is_that_of_the_rounding_unless_given():
    objectives = {one: CalibrationConfig(recipe=one).objective for one in RECIPES}
    assert objectives == {"fast": "ldl", "best": "ldl", "paper": "range", "data-free": "range"}
    assert CalibrationConfig(rounding="nearest").objective == "range"
    assert CalibrationConfig(rounding="nearest", objective="ldl").objective == "ldl"


def test_the_best_recipe_fits_a_transform_for_each_linear_unless_told():
    recipes = {one: CalibrationConfig(recipe=one) for one in RECIPES}
    shared = {one: ParoConfig(calibration=calibration).shares_transforms for one, calibration in recipes.items()}
    assert shared == {"fast": True, "best": False, "paper": True, "data-free": True}
    for told in (True, False):
        config = ParoConfig(share_siblings=told, calibration=recipes["best"])
        assert config.shares_transforms is told
        assert dataclasses.replace(config, calibration=recipes["fast"]).shares_transforms is told


def test_another_calibration_brings_its_own_transforms():
    config = dataclasses.replace(ParoConfig(), calibration=CalibrationConfig(recipe="best"))
    assert not config.shares_transforms
    assert ParoConfig.from_dict(config.to_dict()) == config
    assert dataclasses.replace(config, calibration=CalibrationConfig()).shares_transforms


def test_to_dict_names_every_field():
    assert set(ParoConfig().to_dict()) == {item.name for item in dataclasses.fields(ParoConfig)}
    assert set(CalibrationConfig().to_dict()) == {item.name for item in dataclasses.fields(CalibrationConfig)}


def test_configs_are_frozen_and_hashable():
    config = ParoConfig()
    assert hash(config) == hash(ParoConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 8


def test_sequences_become_tuples():
    assert ParoConfig(modules_to_not_convert=["a", "b"]).modules_to_not_convert == ("a", "b")
    assert ParoConfig(modules_to_not_convert=None).modules_to_not_convert == ()
    assert CalibrationConfig(work_dir=Path("a") / "b").work_dir == str(Path("a/b"))
    assert CalibrationConfig(clip_ratios=[1, 0.5]).clip_ratios == (1.0, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, r"bits must be one of \(3, 4, 8\), got 2.*the kernels know no other width"),
        ({"bits": "4"}, r"bits must be one of \(3, 4, 8\), got '4'"),
        ({"bits": 4.0}, r"bits must be one of \(3, 4, 8\), got 4\.0"),
        ({"group_size": 96}, r"group_size must be one of \(128, 64, 32\), got 96"),
        ({"group_size": 128.0}, r"group_size must be one of \(128, 64, 32\), got 128\.0"),
        ({"krot": -1}, "krot must be an integer of at least 0, got -1"),
        ({"krot": 8.0}, "krot must be an integer of at least 0, got 8.0"),
        ({"krot": True}, "krot must be an integer of at least 0, got True"),
        ({"modules_to_not_convert": "lm_head"}, "must be a sequence of names, got 'lm_head'"),
        ({"modules_to_not_convert": 5}, "must be a sequence of names, got 5"),
        ({"modules_to_not_convert": (1,)}, r"must be a sequence of names, got \(1,\)"),
        ({"lm_head": "int4"}, r"lm_head must be one of \('float', 4, 8\), got 'int4'"),
        ({"lm_head": 3}, r"lm_head must be one of \('float', 4, 8\), got 3"),
        ({"lm_head": 4.0}, r"lm_head must be one of \('float', 4, 8\), got 4.0"),
        ({"calibration": {"steps": 1}}, "calibration must be a CalibrationConfig, got dict"),
        ({"share_siblings": "no"}, "share_siblings must be True or False, got 'no'"),
        ({"mixed_group_size": 1}, "mixed_group_size must be True or False, got 1"),
    ],
)
def test_paro_config_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        ParoConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "slow"}, r"recipe must be one of \('fast', 'best', 'data-free', 'paper'\), got 'slow'"),
        ({"pairs": "random"}, r"pairs must be one of \('matching', 'greedy'\), got 'random'"),
        ({"bits_budget": 0}, "bits_budget must be a number of bits above 0, or None, got 0"),
        ({"bits_budget": float("nan")}, "bits_budget must be a number of bits above 0, or None, got nan"),
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"rows": 0}, "rows must be an integer of at least 1, got 0"),
        ({"seqlen": 1}, "seqlen must be an integer of at least 2, got 1"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"learning_rate": 0.0}, r"learning_rate must be in \(0, 10\), got 0.0"),
        ({"learning_rate": float("nan")}, r"learning_rate must be in \(0, 10\), got nan"),
        ({"learning_rate": "fast"}, r"learning_rate must be in \(0, 10\), got 'fast'"),
        ({"clip_ratios": (True,)}, r"clip_ratios must hold numbers in \(0, 1\], got \(True,\)"),
        ({"learning_rate": True}, r"learning_rate must be in \(0, 10\), got True"),
        ({"work_dir": 5}, "work_dir must be a path, got 5"),
        ({"clip_ratios": ()}, r"clip_ratios must hold numbers in \(0, 1\], got \(\)"),
        ({"clip_ratios": (1.5,)}, r"clip_ratios must hold numbers in \(0, 1\], got \(1.5,\)"),
        ({"clip_ratios": ("tight",)}, r"clip_ratios must hold numbers in \(0, 1\], got \('tight',\)"),
        ({"clip_ratios": 0.5}, r"clip_ratios must hold numbers in \(0, 1\], got 0.5"),
        ({"recipe": None}, r"recipe must be one of \(.*\), got None"),
        ({"rounding": "up"}, r"rounding must be one of \('nearest', 'feedback'\), got 'up'"),
        ({"block_loss": "l1"}, r"block_loss must be one of \('relative', 'smooth_l1'\), got 'l1'"),
        ({"damping": (0.1, 0.0)}, r"damping must hold numbers in \(0, 1\], got \(0.1, 0.0\)"),
        ({"sweeps": -1}, "sweeps must be an integer of at least 0, got -1"),
        ({"transform_epochs": 0.5}, "transform_epochs must be an integer of at least 0, got 0.5"),
        ({"weight_learning_rate": 0}, r"weight_learning_rate must be in \(0, 10\), got 0"),
        ({"autocast": None}, "autocast must be True or False, got None"),
        ({"resume": "yes"}, "resume must be True or False, got 'yes'"),
    ],
)
def test_calibration_config_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig(**options)


def test_all_problems_are_raised_at_once():
    with pytest.raises(ConfigError) as caught:
        ParoConfig(bits=2, group_size=7, krot=-1)
    assert all(name in str(caught.value) for name in ("bits", "group_size", "krot", "invalid ParoConfig"))


def test_unknown_options_are_refused_with_the_accepted_ones():
    with pytest.raises(ConfigError, match=r"unknown ParoConfig options \['gruop_size', 'wbits'\]; .*accepted.*krot"):
        ParoConfig.from_dict({"wbits": 4, "gruop_size": 128})
    with pytest.raises(
        ConfigError, match=r"unknown CalibrationConfig options \['step'\]; for 'step' perhaps 'steps'; acc"
    ):
        ParoConfig.from_dict({"calibration": {"step": 3}})


def test_config_errors_are_value_errors_of_ours():
    with pytest.raises(ValueError, match="bits") as caught:
        ParoConfig(bits=5)
    assert isinstance(caught.value, ParoError)


def test_one_per_line_cuts_and_counts():
    assert one_per_line(["a", "b"]) == "  - a\n  - b"
    assert one_per_line("abcd", limit=2) == "  - a\n  - b\n  - … and 2 more"
    assert one_per_line([]) == ""
