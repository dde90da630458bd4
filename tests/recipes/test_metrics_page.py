"""docs/metrics.md names every number that a run of the recipe logs."""

import json
import re
from pathlib import Path

from barrierlm.recipes.config import load_options
from barrierlm.recipes.finetune import finetune

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_metrics_of_a_run_are_documented(overrides: list[str], tmp_path: Path):
    options = load_options(None, [*overrides, "optim.steps=1", "save_model=false", "balance_every=1"])
    finetune(options)
    line = json.loads((Path(options.output_dir) / "metrics.jsonl").read_text(encoding="utf-8"))
    logged = {re.sub(r"^constraints/length(/lower|/upper)?/", "constraints/<name>/", name) for name in line} - {"step"}
    names = set(re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    documented = {name.replace("/<side>/", "/") for name in names}
    assert logged == documented
