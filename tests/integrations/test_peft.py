"""PEFT: the reference is the model with its adapter off."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from barrierlm.integrations.logits import kl
from barrierlm.integrations.rollouts import unwrapped

from .examples import added_lines, run_both
from .tiny import collate, make_model, make_rows


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_disabled_adapter_is_the_starting_model():
    base, batch = make_model(), collate(make_rows(4))
    start = copy.deepcopy(base).eval()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    logits = model(**batch).logits
    with torch.no_grad(), unwrapped(model).disable_adapter():
        reference = unwrapped(model)(**batch).logits
    torch.testing.assert_close(reference, start(**batch).logits.detach())
    distance = kl(logits, reference, batch["labels"])
    assert (distance > 1e-3).all()
    distance.mean().backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())


def test_the_example_meets_its_bound(tmp_path):
    constrained, plain = run_both("peft_reference.py", tmp_path)
    assert constrained["kl"] <= 0.3 < plain["kl"]
    assert len(added_lines("peft_reference.py")) <= 12
