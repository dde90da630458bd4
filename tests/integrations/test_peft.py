"""PEFT: the reference is the model with its adapter off."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from barrierlm import Constraint
from barrierlm.integrations.logits import kl
from barrierlm.integrations.models import in_evaluation, reference_logits

from .examples import added_lines, run_both
from .test_transformers import Gradients, InOrder, make_objective, make_trainer
from .tiny import collate, make_model, make_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)


def test_the_disabled_adapter_is_the_starting_model():
    base, batch = make_model(), collate(make_rows(4))
    start = copy.deepcopy(base).eval()
    model = get_peft_model(base, LORA)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    logits = model(**batch).logits
    reference = reference_logits(torch.compile(model, backend="eager"), batch)
    torch.testing.assert_close(reference, start(**batch).logits.detach())
    assert model.training
    assert torch.equal(model(**batch).logits, logits)
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM; allowed: a PeftModel"):
        reference_logits(base, batch)
    distance = kl(logits, reference, batch["labels"])
    assert (distance > 1e-3).all()
    distance.mean().backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())


def test_the_model_is_afterwards_as_before():
    """Modules that are kept in evaluation mode stay in it, and weights of the adapter that are frozen stay frozen."""
    model = get_peft_model(make_model(), LORA)
    model.train()
    model.get_input_embeddings().eval()
    model.add_adapter("another", LORA)
    for name, p in model.named_parameters():  # of the active adapter, and of the other
        p.requires_grad_("lora_B.default" in name or "lora_A.another" in name)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    reference_logits(model, collate(make_rows(2)))
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert len(set(before[0])) == len(set(before[1])) == 2


class _Merging(torch.nn.Module):
    """As LoRA layers that merge their weights for evaluation."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_modules_undo_what_their_evaluation_mode_did():
    model = torch.nn.Sequential(_Merging(), torch.nn.Sequential(_Merging(), torch.nn.Dropout()), _Merging())
    model[1].eval()
    model[1][1].train()
    before = [(m.training, getattr(m, "merged", None)) for m in model.modules()]
    with in_evaluation(model):
        assert all(m.merged for m in model.modules() if isinstance(m, _Merging))
        assert not any(m.training for m in model.modules())
    assert [(m.training, getattr(m, "merged", None)) for m in model.modules()] == before


def test_gradients_are_those_of_a_plain_loop_with_a_second_model(tmp_path):
    torch.manual_seed(0)
    rows, gradients, seen = make_rows(12), Gradients(), []
    objective, other = (make_objective(Constraint("kl", upper=0.001, scale=0.1)) for _ in range(2))
    base = make_model().double()  # the steps are large, and magnify rounding differently on every processor
    start = copy.deepcopy(base).eval()
    model = get_peft_model(base, LORA)
    plain = copy.deepcopy(model)
    made = make_trainer(
        tmp_path,
        objective,
        rows,
        lambda m, inputs, outputs: {"kl": kl(outputs.logits, reference_logits(m, inputs), inputs["labels"])},
        kind=InOrder,
        callbacks=[gradients],
        model=model,
        num_samples=None,
        learning_rate=5.0,
    )
    made.train()
    optimizer = torch.optim.SGD((p for p in plain.parameters() if p.requires_grad), lr=5.0)
    for first in (0, 6) * 2:
        batch = collate(rows[first : first + 6])
        outputs = plain(**batch)
        with torch.no_grad():
            reference = start(**batch).logits
        out = other.combine(outputs.loss, {"kl": kl(outputs.logits, reference, batch["labels"])})
        out.loss.backward()
        seen.append(torch.cat([p.grad.flatten().clone() for p in plain.parameters() if p.requires_grad]))
        optimizer.step()
        optimizer.zero_grad()
        other.step()
    assert len(seen) == len(gradients.seen) == 4
    for mine, own in zip(gradients.seen, seen, strict=True):
        assert (mine - own).norm() < 1e-5 * own.norm()
    assert other.report()[0].multiplier > 1
    assert objective.report()[0].multiplier == pytest.approx(other.report()[0].multiplier, rel=1e-4)


def test_the_example_meets_its_bound(tmp_path):
    constrained, plain = run_both("peft_reference.py", tmp_path)
    assert constrained["kl"] <= 0.3 < plain["kl"]
    assert len(added_lines("peft_reference.py")) <= 12
