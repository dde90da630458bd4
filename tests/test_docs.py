"""Documents are executed: Python blocks run, commands exist, options are listed, every public name is explained."""

import doctest
import importlib
import inspect
import re
import shlex
from pathlib import Path

import barrierlm_kernels
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import barrierlm

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/*.md")])


#: What TRL and the trainer under it warn of by themselves on a CPU.
TRL_WARNS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (":FutureWarning", ".*pin_memory.*:UserWarning", ":ResourceWarning")
]


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=TRL_WARNS if p.name == "trl.md" else [], id=p.name) for p in DOCUMENTS]
)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = Sybil(parsers=[PythonCodeBlockParser()], path=str(ROOT)).parse(path)
    blocks = list(document.examples())
    assert len(blocks) == path.read_text(encoding="utf-8").count("```python")
    for block in blocks:
        block.evaluate()


def shell_lines():
    for path in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                if line.split("#")[0].strip():
                    yield pytest.param(line.split("#")[0].strip(), id=f"{path.name}: {line[:40]}")


@pytest.mark.parametrize("line", list(shell_lines()))
def test_commands_exist(line):
    from barrierlm.cli import _parser
    from barrierlm.recipes.config import load_options

    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
        return
    if words[0] == "accelerate":
        assert words[words.index("-m") + 1] == "barrierlm.cli"
        words = ["barrierlm", *words[words.index("-m") + 2 :]]
    assert Path(words[0]).name == "barrierlm"
    arguments = _parser().parse_args(words[1:])
    if arguments.command == "finetune":
        load_options(arguments.config, list(arguments.overrides))


def test_yaml_blocks_are_valid_configurations(tmp_path):
    from barrierlm.recipes.config import load_options

    blocks = [b for p in DOCUMENTS for b in re.findall(r"```yaml\n(.*?)```", p.read_text(encoding="utf-8"), re.DOTALL)]
    assert blocks
    for block in blocks:
        config = tmp_path / "config.yaml"
        config.write_text(block, encoding="utf-8")
        load_options(str(config), [])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_no_placeholders_are_left(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.fullmatch(r"[A-Z_]{4,}", line)]


def test_the_option_table_is_current():
    from barrierlm.recipes.config import option_table

    committed = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert option_table().strip() in committed, "run `make docs-options`"


#: What a user imports from each module of barrierlm.integrations, and the package that it needs.
INTEGRATIONS = {
    "costs": (None, []),
    "lightning": ("lightning", ["BarrierCallback"]),
    "logits": (None, ["entropy", "kl", "logps", "nll"]),
    "models": ("peft", ["reference_logits", "unwrapped"]),
    "rollouts": ("transformers", ["Rollouts", "prompt_tokens"]),
    "transformers": ("transformers", ["BarrierMixin", "BarrierTrainer"]),
    "trl": (
        "trl",
        [
            *("BarrierDPOTrainer", "BarrierGRPOTrainer", "BarrierRLOOTrainer", "BarrierSFTTrainer"),
            *("Batch", "ConstrainedLoss", "ConstrainedRewards", "PreferenceBatch"),
        ],
    ),
}


def integration(name):
    """The module; the test is skipped where its package is missing."""
    package = INTEGRATIONS[name.split(".")[0]][0]
    if package is not None:
        pytest.importorskip(package)
    return importlib.import_module(f"barrierlm.integrations.{name}")


def public():
    for package in (barrierlm, barrierlm_kernels):
        for name in package.__all__:
            yield pytest.param(package, name, id=f"{package.__name__}.{name}")
    for module, (_, names) in INTEGRATIONS.items():
        for name in names:
            yield pytest.param(module, name, id=f"integrations.{module}.{name}")


def test_the_integrations_are_listed():
    folder = ROOT / "barrierlm" / "integrations"
    modules = {path.stem for path in [*folder.glob("[a-z]*.py"), *folder.glob("[a-z]*/__init__.py")]} - {"__init__"}
    assert modules | {"trl"} == INTEGRATIONS.keys() | {"checkpoint", "hooks"}  # which no user imports
    assert sorted(INTEGRATIONS["trl"][1]) == integration("trl").__all__


@pytest.mark.parametrize(("module", "name"), list(public()))
def test_public_names_are_documented(module, name):
    thing = getattr(integration(module) if isinstance(module, str) else module, name)
    text = inspect.getdoc(thing) or ""
    assert len(text.splitlines()[0]) > 20, "one line that says what it is"
    own_init = inspect.isfunction(thing) or (
        inspect.isclass(thing) and not inspect.isabstract(thing) and not issubclass(thing, tuple)
    )
    if own_init and not thing.__name__.endswith("Output"):
        assert ">>>" in text, "a runnable example"
        parameters = [p for p in inspect.signature(thing).parameters if p not in ("args", "kwargs")]
        for parameter in parameters:
            assert re.search(rf"\b{parameter}\b", text), f"argument {parameter} is not documented"
        if parameters:
            assert "Args:" in text
            assert "Raises:" in text or "Raises nothing." in text
    if inspect.isclass(thing):
        for name, member in inspect.getmembers(thing, callable):
            if not name.startswith("_") and (getattr(member, "__module__", "") or "").startswith("barrierlm"):
                assert inspect.getdoc(member), f"{name} is not documented"


MODULES = [
    "balance",
    "barriers",
    "baselines",
    "best",
    "constraints",
    "estimators",
    "learning",
    "objective",
    "packing",
    "probe",
    "sampling",
    "schedules",
]


EXAMPLES = [
    *("costs", "lightning", "logits", "models", "rollouts", "transformers"),
    *("trl.batch", "trl.losses", "trl.rewards"),
]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [*MODULES, *(f"integrations.{name}" for name in EXAMPLES)])
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = name.removeprefix("integrations.")
    module = integration(inside) if inside != name else importlib.import_module(f"barrierlm.{name}")
    names = {key: getattr(barrierlm, key) for key in barrierlm.__all__}
    result = doctest.testmod(module, extraglobs={"torch": torch, **names})
    assert result.attempted > 0
    assert result.failed == 0
