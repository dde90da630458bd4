"""The tiny model and its data, once a session."""

from pathlib import Path

import pytest

from barrierlm.recipes.config import load_options
from barrierlm.recipes.model import load_policy
from barrierlm.recipes.options import Options

from .tiny import make_data, make_model, tiny_overrides


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-data") / "pairs.jsonl"
    make_data(path)
    return path


@pytest.fixture
def overrides(model_folder: Path, data_file: Path, tmp_path: Path) -> list[str]:
    return tiny_overrides(model_folder, data_file, tmp_path / "run")


@pytest.fixture
def options(overrides: list[str]) -> Options:
    return load_options(None, overrides)


@pytest.fixture
def policy_and_tokenizer(options: Options):
    return load_policy(options.model)
