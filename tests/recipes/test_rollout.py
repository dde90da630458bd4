import pytest
import torch

from barrierlm.recipes.data import Pair, Tokens, end_of_turn_id
from barrierlm.recipes.model import lay_out
from barrierlm.recipes.rollout import draw, sample_responses


def tokens(*prompt_ids: int) -> Tokens:
    return Tokens(Pair("p", "r", "o"), list(prompt_ids), [1])


PROMPTS = [tokens(2, 7, 8, 3), tokens(2, 3), tokens(2, 10, 11, 12, 13, 3)] * 4


def test_responses_end_with_the_end_of_turn_or_are_censored(policy_and_tokenizer):
    policy, tokenizer = policy_and_tokenizer
    end = end_of_turn_id(tokenizer)
    rollouts = sample_responses(policy, tokenizer, PROMPTS, end_of_turn=end, max_new_tokens=20)
    assert [r.prompt for r in rollouts] == PROMPTS
    assert any(r.censored for r in rollouts)
    assert any(not r.censored for r in rollouts)
    for r in rollouts:
        assert r.ids.count(end) == (0 if r.censored else 1)
        assert (len(r.ids) == 20) if r.censored else (r.ids[-1] == end)
        assert r.text == tokenizer.decode(r.ids, skip_special_tokens=True)


def test_no_prompts(policy_and_tokenizer):
    policy, tokenizer = policy_and_tokenizer
    assert sample_responses(policy, tokenizer, [], end_of_turn=1, max_new_tokens=4) == []


def test_responses_follow_the_models_own_distribution(policy_and_tokenizer):
    """Temperature 1, no truncation, no penalty, although this model's own generation defaults say otherwise."""
    policy, tokenizer = policy_and_tokenizer
    prompt, n = tokens(2, 10, 11, 3), 3000
    rollouts = sample_responses(policy, tokenizer, [prompt] * n, end_of_turn=1, max_new_tokens=2)
    vocab = len(tokenizer)
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.tensor([prompt.prompt_ids])).logits[0, -1]
        follow = torch.tensor([[*prompt.prompt_ids, v] for v in range(vocab)])
        second = policy.lm(input_ids=follow).logits[:, -1].softmax(-1)
    first = logits.softmax(-1)
    joint = first[:, None] * second
    joint[1] = torch.nn.functional.one_hot(torch.tensor(0), vocab) * first[1]
    seen = torch.zeros(vocab, vocab)
    for r in rollouts:
        seen[r.ids[0], r.ids[1] if len(r.ids) > 1 else 0] += 1
    for expected, count in ((first, seen.sum(1)), (joint.sum(0), seen.sum(0))):
        sigma = (n * expected * (1 - expected)).sqrt().clamp(min=1)
        assert ((count - n * expected).abs() / sigma).max() < 4.5


def test_dropping_finished_rows_changes_nothing(policy_and_tokenizer, monkeypatch: pytest.MonkeyPatch):
    """The continued cache gives every response the probabilities of a fresh forward pass: greedy text is equal."""
    policy, tokenizer = policy_and_tokenizer
    monkeypatch.setattr("barrierlm.recipes.rollout.draw", lambda logits: logits.argmax(-1))
    cut = [sample_responses(policy, tokenizer, PROMPTS[:3], end_of_turn=1, max_new_tokens=n) for n in (24, 24)]
    alone = [sample_responses(policy, tokenizer, [p], end_of_turn=1, max_new_tokens=24)[0] for p in PROMPTS[:3]]
    monkeypatch.setattr("barrierlm.recipes.rollout._SEGMENT", 24)
    whole = sample_responses(policy, tokenizer, PROMPTS[:3], end_of_turn=1, max_new_tokens=24)
    assert cut[0] == cut[1] == alone == whole
    mixed = [2, 0, 1, 0, 2, 2]  # several responses to a prompt, in any order
    many = sample_responses(policy, tokenizer, [PROMPTS[i] for i in mixed], end_of_turn=1, max_new_tokens=24)
    assert many == [alone[i] for i in mixed]
    assert len({tuple(r.ids) for r in alone}) > 1


def test_log_probabilities_of_the_packed_forward_are_those_of_generation(policy_and_tokenizer):
    policy, tokenizer = policy_and_tokenizer
    recorded: list[torch.Tensor] = []

    def record(module, args, logits):
        recorded.append(logits[:, -1].log_softmax(-1))

    hook = policy.head.register_forward_hook(record)
    (rollout,) = sample_responses(policy, tokenizer, [PROMPTS[2]], end_of_turn=1, max_new_tokens=20)
    hook.remove()
    generated = torch.stack([row[0, token] for row, token in zip(recorded, rollout.ids, strict=False)])
    packed = policy(lay_out([PROMPTS[2].prompt_ids, [2, 3]], [rollout.ids, [5, 1]]))
    torch.testing.assert_close(packed[: len(rollout.ids)].detach(), generated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [3, 256, 257, 1000])
def test_draws_follow_the_probabilities(vocab):
    torch.manual_seed(0)
    n = 200_000
    logits = 2 * torch.randn(vocab)
    logits[[0, -1]] = -float("inf")
    logits[vocab // 2] = 3.0
    p = logits.double().softmax(-1)
    seen = torch.cat([draw(logits.expand(2000, -1)) for _ in range(n // 2000)]).bincount(minlength=vocab)
    assert seen[p == 0].sum() == 0
    likely = n * p > 5
    chi2 = ((seen - n * p).square() / (n * p))[likely].sum()
    degrees = likely.sum() - 1
    assert abs(chi2 - degrees) < 4.5 * (2 * degrees).sqrt() + 1e-9


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (1 - 2**-53, 257)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch, u, token):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, u, **options))
    logits = torch.full((1, 300), -float("inf"))
    logits[0, [1, 257]] = 0.0
    assert draw(logits).tolist() == [token]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_tokens_from_logits_that_are_not_finite(bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        draw(logits)


def test_a_prompt_is_read_once(policy_and_tokenizer):
    """With several responses to each, and as if each had been read by itself."""
    policy, tokenizer = policy_and_tokenizer
    read: list[int] = []
    hook = (
        policy.lm.get_base_model()
        .get_decoder()
        .register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    )
    many = sample_responses(policy, tokenizer, [PROMPTS[2]] * 3, end_of_turn=1, max_new_tokens=3)
    hook.remove()
    assert read[0] == len(PROMPTS[2].prompt_ids)
    assert len(many) == 3
