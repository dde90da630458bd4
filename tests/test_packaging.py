"""What is in the wheel and the sdist, and that they work where they are installed."""

import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import barrierlm

ROOT = Path(__file__).parent.parent
CONFIGS = {f"barrierlm/recipes/configs/{name}.yaml" for name in ("demo", "sentiment")}
TYPED = {"barrierlm/py.typed", "barrierlm_kernels/py.typed"}
#: Everything that is imported from elsewhere, apart from torch, by extra.
OPTIONAL = {
    "triton": ["triton"],
    "recipes": ["omegaconf", "rich", "gguf", "matplotlib", "chitchat_dataset", "vaderSentiment", "profanity_check"],
    "transformers": ["transformers", "accelerate"],
    "trl": ["trl", "datasets", "peft"],
    "lightning": ["lightning"],
}
#: A finder in front of all others, for which some packages are not installed.
BLOCK = """
import sys

class Finder:
    blocked, others = {blocked!r}, sys.meta_path

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            return None
        return next(filter(None, (f.find_spec(name, path, target) for f in self.others)), None)

    def find_distributions(self, *context):
        for finder in self.others:
            yield from getattr(finder, "find_distributions", lambda *c: ())(*context)

sys.meta_path = [Finder()]
"""


def python(code: str, *, blocked: list[str] = (), cwd: Path | None = None, path: list[Path] = ()) -> str:
    """What a fresh interpreter prints, with some packages made unimportable and some folders first on the path."""
    places = [*path, *([ROOT, ROOT / "kernels"] if not path else [])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, "-c", BLOCK.format(blocked=blocked) + textwrap.dedent(code)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def files_of(builder) -> set[str]:
    return {file.distribution_path.replace(os.sep, "/") for file in builder.recurse_included_files()}


def modules() -> set[str]:
    folders = (ROOT, "barrierlm"), (ROOT / "kernels", "barrierlm_kernels")
    return {p.relative_to(base).as_posix() for base, name in folders for p in (base / name).rglob("*.py")}


def test_what_the_wheel_holds():
    files = files_of(WheelBuilder(str(ROOT)))
    assert files >= modules() | CONFIGS | TYPED
    assert {name.split("/")[0] for name in files} == {"barrierlm", "barrierlm_kernels"}
    assert not [name for name in files if "__pycache__" in name or name.endswith((".pyc", ".so"))]


def test_what_the_sdist_holds():
    files = files_of(SdistBuilder(str(ROOT)))
    needed = {"Makefile", "constraints.txt", "mkdocs.yml", "README.md", "CITATION.cff", "tests/test_packaging.py"}
    assert files >= needed | {f"kernels/{m}" for m in modules() if m.startswith("barrierlm_kernels/")}
    assert {"docs/guide.md", "docs/hooks/site.py", "docs/figures/loop.svg", "kernels/README.md"} <= files
    assert not [name for name in files if name.startswith(("runs/", "site/", ".venv/", "dist/"))]


def test_the_version_is_one():
    builder = WheelBuilder(str(ROOT))
    assert builder.metadata.version == barrierlm.__version__
    assert f"version: {barrierlm.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_extra_is_known_to_these_tests():
    extras = builder_extras()
    assert extras.keys() - {"dev", "docs"} == OPTIONAL.keys()


def builder_extras() -> dict[str, list[str]]:
    return WheelBuilder(str(ROOT)).metadata.core.optional_dependencies


def test_torch_alone_is_enough():
    """All optional packages absent: everything but the recipe works, or says in one line what to install."""
    integrations = [path.stem for path in sorted((ROOT / "barrierlm" / "integrations").glob("[a-z]*.py"))]
    printed = python(
        f"""
        import importlib
        import torch, barrierlm, barrierlm_kernels
        from barrierlm import BarrierObjective, Constraint, PackedBatch, Sampled
        from barrierlm.cli import main

        objective = BarrierObjective(None, [Constraint("length", upper=1.0)])
        batch = PackedBatch(torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([0.0]), num_sampled=1)
        for _ in range(2):
            hidden, head = torch.randn(2, 4, requires_grad=True), torch.randn(8, 4)
            out = objective.linear(hidden, head, batch, {{"length": Sampled.per_token(torch.ones(2))}})
            out.loss.backward()
            objective.step()
        choice = barrierlm_kernels.which_impl("auto", device="cpu", dtype=torch.float32)
        print(choice.impl, objective.report()[0].estimate)
        try:
            barrierlm_kernels.which_impl("triton", device="cpu", dtype=torch.float32)
        except Exception as error:
            print(error)
        for name in {integrations}:
            try:
                importlib.import_module("barrierlm.integrations." + name)
            except ModuleNotFoundError as error:
                print(error)
            else:
                print("imported")
        """,
        blocked=[*(name for names in OPTIONAL.values() for name in names), "numpy"],
    )
    works, triton, *others = printed.splitlines()
    assert works == "reference 2.0"
    assert "triton" in triton.lower()
    assert len(others) == len(integrations)
    assert all(line == "imported" or "pip install 'barrierlm[" in line for line in others), others


@pytest.mark.slow
def test_the_command_names_the_extra(tmp_path):
    """Whatever the recipe is missing first."""
    packages = ["omegaconf", "transformers", "accelerate"]
    printed = python(
        f"""
        import contextlib, io
        finder = sys.meta_path[0]
        for package in {packages}:
            for name in [n for n in sys.modules if n.split(".")[0] in ("barrierlm", package)]:
                del sys.modules[name]
            finder.blocked = [package]
            from barrierlm.cli import main
            err = io.StringIO()
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                try:
                    status = main(["finetune", "demo"])
                except SystemExit as error:
                    status = error.code
            print(status, *err.getvalue().splitlines())
        """,
        cwd=tmp_path,
    )
    lines = printed.splitlines()
    assert len(lines) == len(packages)
    for line, package in zip(lines, packages, strict=True):
        assert line.startswith("2 ")
        assert package in line
        assert line.count("pip install 'barrierlm[recipes]'") == 1, line


def test_beside_a_package_named_kernels(tmp_path):
    """Hugging Face's `kernels` is found, wherever it is on the path, although the repository has a folder kernels/."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    places = [str(ROOT), str(ROOT / "kernels"), str(tmp_path)]
    for path in (places, places[::-1]):
        found = PathFinder.find_spec("kernels", path)
        assert found.origin == str(package / "__init__.py")
        assert Path(PathFinder.find_spec("barrierlm_kernels", path).origin).parent.parent == ROOT / "kernels"


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions, built as a user would; the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_twine_has_no_complaints(dist):
    files = [str(path) for path in dist.iterdir()]
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_wheel_is_what_was_promised(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == files_of(WheelBuilder(str(ROOT)))
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


@pytest.mark.slow
def test_an_installed_wheel_works(dist, tmp_path):
    place = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*command, str(next(dist.glob("*.whl")))], check=True, capture_output=True)
    printed = python(
        """
        import barrierlm, barrierlm_kernels, torch
        from barrierlm.recipes.config import load_options
        objective = barrierlm.BarrierObjective(None, [barrierlm.Constraint("x", upper=1.0)])
        objective.combine(None, {"x": torch.tensor(2.0, requires_grad=True)}).loss.backward()
        objective.step()
        print(barrierlm.__file__, barrierlm_kernels.__file__, len(load_options("demo", []).constraints))
        """,
        cwd=tmp_path,
        path=[place],
    )
    assert printed == f"{place}/barrierlm/__init__.py {place}/barrierlm_kernels/__init__.py 1"
    script = subprocess.run(
        [sys.executable, str(place / "bin" / "barrierlm"), "options"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
    )
    assert "`constraints.NAME.upper`" in script.stdout


@pytest.mark.slow
def test_the_tests_of_an_sdist_pass(dist, tmp_path):
    """A part of them that touches everything that could have been left out."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = next(tmp_path.iterdir())
    parts = ["tests/core/test_objective.py", "tests/kernels/test_kernel_padded.py", "tests/recipes/test_config.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parts, "tests/test_imports.py"]
    command += ["tests/test_docs.py", "-k", "not import_time and not python_blocks_run"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
