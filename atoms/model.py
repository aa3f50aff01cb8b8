"""Base models: loading, dtype and device, prompt formatting, fingerprints, and merging θ0 into the weights.

Knows transformers. Used by discovery and by the embedded server, so that both read prompts and weights in one way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from atoms.adapter import Adapter
from atoms.errors import AdapterError, ConfigError, ModelError
from atoms.storage import canonical_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VOLATILE_CONFIG = {
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config", "use_cache", "architectures",
    "_attn_implementation_autoset",
}  # fmt: skip
_FINGERPRINT_SAMPLES = 64


def choose_device(name: str = "auto") -> torch.device:
    """``auto``: CUDA, then MPS, then CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used ({error}); choose auto, cpu, cuda or mps") from error
    return device


def choose_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """``auto``: bf16 on CUDA and on CPUs with bf16 instructions, else fp32 (emulated bf16 is ~30x slower than fp32)."""
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def load_model(
    path: str, dtype: torch.dtype, device: torch.device, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen causal LM in eval mode, and its tokenizer. `path` is a directory or a hub id.

    Raises ModelError if it cannot be loaded, is quantised, or is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    with _loading_errors(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, revision=revision)
    tokenizer = load_tokenizer(path, revision)
    if getattr(model.config, "quantization_config", None) or getattr(model, "is_quantized", False):
        raise ModelError(f"{path!r} is quantised; load the full-precision weights, whose gradients are exact")
    model.to(device)  # type: ignore[arg-type]  # transformers' stub loses the device overload
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone. Raises ModelError if it cannot be loaded."""
    from transformers import AutoTokenizer

    with _loading_errors(path):
        return AutoTokenizer.from_pretrained(path, revision=revision)


@contextmanager
def _loading_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load a causal language model from {path!r}: {cause}; give a directory or hub id that "
            "transformers' AutoModelForCausalLM loads"
        ) from error


def config_hash(model: PreTrainedModel) -> str:
    """sha256 of the architecture-defining part of the model's config."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG}
    return canonical_hash(_jsonable(config))


def weights_fingerprint(model: PreTrainedModel) -> str:
    """sha256 over bf16-rounded samples of every parameter: tells two checkpoints of one architecture apart.

    Rounding to bf16 makes it independent of whether fp32, fp16 or bf16 was loaded from bf16 weights. Computed on the
    unmerged model.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + sample_weight(parameter))
    return digest.hexdigest()


def sample_weight(parameter: torch.Tensor) -> bytes:
    """What one parameter adds to `weights_fingerprint`."""
    flat = parameter.detach().reshape(-1)
    picks = torch.linspace(0, flat.numel() - 1, min(_FINGERPRINT_SAMPLES, flat.numel()), dtype=torch.float64)
    sample = flat[picks.long().to(flat.device)].to("cpu", torch.bfloat16).float()
    return sample.numpy().tobytes()


def find_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear at module path `name`. Raises AdapterError if there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(f"the model has no module {name!r}; the adapter was made for another architecture") from None
    if not isinstance(module, nn.Linear):
        raise AdapterError(f"module {name!r} is a {type(module).__name__}, not a linear projection")
    return module


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Adds s·B0·A0 to the weights in place, summed in fp32.

    Raises AdapterError if a module is missing, of other size, or has its weights from the input embedding.
    """
    embedding = model.get_input_embeddings().weight
    for module in adapter.space.modules:
        weight = find_linear(model, module.name).weight
        if weight is embedding:  # PEFT adds the adapter to the logits alone
            raise AdapterError(f"{module.name} shares its weights with the input embedding, which merging would change, too; "
                               "train an adapter without it")  # fmt: skip
        if tuple(weight.shape) != (module.d_out, module.d_in):
            raise AdapterError(
                f"{module.name} has weight {tuple(weight.shape)}; the adapter needs ({module.d_out}, {module.d_in})"
            )
        a, b = adapter.tensors[module.key_a], adapter.tensors[module.key_b]
        delta = (b.float() @ a.float()) * module.scaling
        weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Text of `messages` up to the start of the assistant's turn, in the chat template, which is given `tools`.

    A tokenizer without a template (a pretrained base model) gets the contents separated by blank lines.
    """
    if tokenizer.chat_template:
        return _template(tokenizer, messages, tools, add_generation_prompt=True)
    return "\n\n".join(str(message["content"]) for message in messages) + "\n\n"


def render_response(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    """Text of the last message with the end-of-turn token that the template (or the tokenizer) puts after it.

    Follows `render_prompt` of the messages before it.
    """
    if tokenizer.chat_template:
        prompt = render_prompt(tokenizer, messages[:-1])
        full = _template(tokenizer, messages, add_generation_prompt=False)
        if full.startswith(prompt):
            return full[len(prompt) :].rstrip()
    return str(messages[-1]["content"]) + str(tokenizer.eos_token or "")


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Token ids of `render_prompt`, led by ``<bos>`` where the tokenizer has one and the template wrote none."""
    ids = tokenizer(render_prompt(tokenizer, messages, tools), add_special_tokens=False)["input_ids"]
    if tokenizer.chat_template:
        return ids
    return with_bos(tokenizer, ids)


def with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` led by the tokenizer's ``<bos>``, if its convention adds one to plain text."""
    bos = tokenizer.bos_token_id
    adds_bos = getattr(tokenizer, "add_bos_token", False) or tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if bos is not None and adds_bos and ids[:1] != [bos] else ids


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's end-of-sequence tokens."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence in tokens that the model's positions allow."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", 2048))


def _template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool,
) -> str:
    plain = [dict(message) for message in messages]
    shown: list[Any] | None = [dict(tool) for tool in tools] or None
    text = tokenizer.apply_chat_template(
        plain, tools=shown, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return cast(str, text)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
