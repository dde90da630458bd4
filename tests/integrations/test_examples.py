"""Every example is on its page as it is, with the number of lines that constraints add, which is at most 12."""

import pytest

from .examples import EXAMPLES, ROOT, added_lines, unconstrained

PAGES = {
    "transformers_trainer.py": "transformers",
    "accelerate_loop.py": "accelerate",
    "lightning_module.py": "lightning",
    "peft_reference.py": "peft",
    "compiled_step.py": "compile",
}


@pytest.mark.parametrize("name", PAGES)
def test_pages_hold_the_examples(name):
    page = (ROOT / "docs" / "integrations" / f"{PAGES[name]}.md").read_text(encoding="utf-8")
    assert f"```py\n{(EXAMPLES / name).read_text(encoding='utf-8').strip()}\n```" in page
    added = len(added_lines(name))
    assert f"add or change {added} lines" in page
    assert 3 <= added <= 12
    compile(unconstrained(name), name, "exec")
