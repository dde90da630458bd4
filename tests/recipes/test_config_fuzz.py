"""Configurations from anyone: only `ConfigError`, no code, no environment."""

import os
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from barrierlm.recipes.config import ConfigError, load_options, to_yaml
from barrierlm.recipes.options import Options

KEYS = ["model", "data", "constraints", "costs", "objective", "rollout", "optim", "evaluation", "seed", "output_dir"]
KEYS += ["length", "kl", "upper", "lower", "cost", "scale", "steps", "rule_options", "name", "lora_rank", "timeout"]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
)
scalars |= st.sampled_from(["${seed}", "${optim.steps}", "${nothing}", "${oc.env:HOME}", "${", "???", "1e999", "a:b"])
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers() | st.none() | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def load(text: str | bytes, folder: Path) -> Options | None:
    """The options of a file with this text, or None where it was refused as documented."""
    file = folder / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        return load_options(file)
    except ConfigError as error:
        assert str(error)  # noqa: PT017
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@settings(max_examples=150)
@given(tree=st.dictionaries(st.sampled_from(KEYS), trees, max_size=5) | trees)
def test_any_yaml(folder: Path, tree: object):
    options = load(yaml.dump(tree), folder)
    if options is not None:  # what passed is written out and read again
        assert to_yaml(load(to_yaml(options), folder)) == to_yaml(options)


@given(
    text=st.text(max_size=60) | st.text(alphabet="{}[]:,-&*!|>'\"#%@ \nab1${}", max_size=60) | st.binary(max_size=60)
)
@example(text="[" * 5000)
@example(text="a: " * 50)
@example(text=b"\xff\xfe\x00")
@example(text="3")
@example(text="2020-01-01: 3")
@example(text="seed: 1\nseed: 2")
@example(text="seed: &a [*a]")
def test_any_text(folder: Path, text: str | bytes):
    load(text, folder)


@given(
    overrides=st.lists(
        st.text(max_size=20)
        | st.builds(
            "{}.{}={}".format,
            st.sampled_from(KEYS),
            st.sampled_from(KEYS),
            st.text(alphabet=string.printable, max_size=12),
        ),
        max_size=3,
    )
)
@example(overrides=["objective.rule_options.a=" + "[" * 3000])
@example(overrides=["..=3"])
@example(overrides=["a[=3"])
def test_any_overrides(overrides: list[str]):
    try:
        load_options(None, overrides)
    except ConfigError as error:
        assert str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: '${oc.env:SECRET}'}",
        "objective: {rule_options: {a: [1, '${oc.env:SECRET,x}']}}",
        "seed: 1\nmodel: {name: '${oc.${data.split}:SECRET}'}\ndata: {split: env}",
        "model: ${oc.create:{name:a}}",
        "model: {name: 'a${oc.decode:1}'}",
    ],
)
def test_functions_in_a_configuration_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"allowed: plain values, or \$\{another.option\}; functions .* not called"
    ) as e:
        load_options(tmp_path / "c.yaml")
    assert "hunter2" not in str(e.value)
    with pytest.raises(ConfigError, match=r"functions such as oc.env are not called"):
        load_options(None, ["model.name=${oc.env:SECRET}"])


def test_an_option_may_refer_to_another():
    assert load_options(None, ["seed=7", "data.split_seed=${seed}"]).data.split_seed == 7


def test_yaml_makes_no_objects(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path / 'hacked'}']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_options(tmp_path / "c.yaml")
    assert "hacked" not in os.listdir(tmp_path)


def test_reading_a_configuration_imports_no_cost(tmp_path: Path):
    """Only `barrierlm finetune` does, after it has said so (test_the_command_says_which_functions_it_imports)."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\ndef cost(completions): ...\n")
    (tmp_path / "c.yaml").write_text(f"constraints: {{c: {{cost: '{tmp_path / 'evil.py'}:cost', upper: 1}}}}")
    assert load_options(tmp_path / "c.yaml").constraints["c"].cost.endswith("evil.py:cost")
    assert not (tmp_path / "hacked").exists()


def test_every_load_of_tensors_is_without_code():
    """`torch.load` without ``weights_only=True`` runs what the file says."""
    root = Path(__file__).parents[2] / "barrierlm"
    calls = [
        line.strip()
        for path in root.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "torch.load(" in line
    ]
    assert calls
    assert all("weights_only=True" in call for call in calls)
    assert not [path for path in root.rglob("*.py") if "trust_remote_code=True" in path.read_text(encoding="utf-8")]
