from pathlib import Path

import pytest

from barrierlm.recipes.config import CONFIGS, ConfigError, load_options, option_table, to_yaml
from barrierlm.recipes.options import ObjectiveOptions, Options
from barrierlm.recipes.workspace import build_objective


def test_defaults_then_file_then_overrides(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {steps: 7, learning_rate: 1.0e-3}\nconstraints: {length: {upper: 20}}\n")
    options = load_options(file, ["optim.steps=9", "constraints.length.lower=5", "constraints.sentiment.lower=0.2"])
    assert options.optim.steps == 9
    assert options.optim.learning_rate == 1e-3
    assert options.optim.batch_size == Options().optim.batch_size
    assert (options.constraints["length"].lower, options.constraints["length"].upper) == (5, 20)
    assert options.constraints["sentiment"].cost == "sentiment"


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_shipped_configs_are_valid(name: str):
    assert load_options(name).constraints


def test_a_config_without_constraints_is_plain_fine_tuning():
    assert load_options().constraints == {}


def test_another_rule_does_not_keep_the_options_of_the_one_before(tmp_path: Path):
    file = tmp_path / "c.yaml"
    parts = "rule: RelaxedLogBarrier, rule_options: {s: 0.25}, estimator_options: {smoothing: 0.5}"
    file.write_text(f"objective: {{{parts}}}")
    assert load_options(file, ["objective.rule=RelaxedLogBarrier"]).objective.rule_options == {"s": 0.25}
    other = load_options(file, ["objective.rule=ModifiedBarrier", "objective.rule_options.mu=0.3"]).objective
    assert other.rule_options == {"mu": 0.3}
    assert other.estimator_options == {"smoothing": 0.5}


def test_rules_that_learn_take_the_unit():
    def rule(*overrides):
        return build_objective(load_options(None, ["constraints.length.upper=5", *overrides])).rule

    assert rule().unit == ObjectiveOptions().unit
    assert rule("objective.unit=0.5").unit == 0.5
    assert rule("objective.rule=ModifiedBarrier", "objective.rule_options.unit=2").unit == 2
    assert not hasattr(rule("objective.rule=RelaxedLogBarrier"), "unit")


@pytest.mark.parametrize(
    ("overrides", "drawn_in"),
    [
        ([], 6.0),
        (["objective.rule=ModifiedBarrier"], 6.0),
        (["objective.confidence=0.5"], 0.5),
        (["objective.confidence=0"], 0.0),
        (["objective.rule=RelaxedLogBarrier"], 0.0),
        (["objective.rule=DualAscent", "objective.confidence=6"], 6.0),
    ],
)
def test_bounds_of_rules_that_learn_are_drawn_in_by_more_until_one_is_given(overrides: list[str], drawn_in: float):
    assert build_objective(load_options(None, ["constraints.length.upper=5", *overrides])).confidence == drawn_in


def test_options_survive_being_written(tmp_path: Path):
    options = load_options("demo", ["objective.rule_options.mu=0.5"])
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(options))
    assert load_options(file) == options


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.step=3", r"unknown option 'optim.step'; did you mean optim.steps"),
        ("nothing=3", r"unknown option 'nothing'.*allowed here: model, data"),
        (
            "constraints.length.uper=3",
            r"'constraints.length.uper'; did you mean constraints.length.upper",
        ),
        ("constraints.length=3", r"constraints.length is 3; allowed: a mapping"),
        ("constraints=3", r"constraints is 3; allowed: a mapping"),
        ("optim=3", r"optim is 3; allowed: a mapping"),
        ("optim.steps=many", r"optim.steps='many': .*allowed"),
        ("optim.steps=0", r"optim.steps=0; allowed: >= 1"),
        ("objective.confidence=-1", r"objective.confidence=-1.0; allowed: >= 0"),
        ("optim.learning_rate=0", r"optim.learning_rate=0.0; allowed: > 0"),
        ("optim.learning_rate=nan", r"optim.learning_rate=nan; allowed"),
        ("optim.decay=square", r"optim.decay='square'; allowed: linear, cosine, constant"),
        ("optim.steps", r"override 'optim.steps'; allowed: key=value"),
        ("constraints.length.upper=null", r"constraints.length: .*at least one finite bound"),
        ("constraints.length.lower=8", r"constraints.length: .*lower < upper"),
        ("constraints.other.upper=1", r"constraints.other.cost='other'; allowed: length, sentiment, profanity, kl"),
        ("rollout.max_new_tokens=9", r"rollout.max_new_tokens=9 with a length bound of 5; allowed: at least twice"),
    ],
)
def test_mistakes_name_the_key_what_was_given_and_what_is_allowed(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_options(None, ["constraints.length.upper=5", override])


def test_kl_needs_lora():
    with pytest.raises(ConfigError, match=r"constraints.kl.cost='kl' with model.lora_rank=0; allowed: LoRA"):
        load_options(None, ["constraints.kl.upper=0.1", "model.lora_rank=0"])


def test_files_that_are_no_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is not a file; allowed: a YAML file, or a shipped config \(demo"):
        load_options("no-such-file.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_options(broken)
    broken.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load_options(broken)


def test_the_table_holds_every_option():
    table = option_table()
    for key in ("model.name", "constraints.NAME.lower", "optim.learning_rate", "output_dir", "evaluation.prompts"):
        assert f"| `{key}` |" in table
    assert all(line.count("|") == 5 for line in table.splitlines())
