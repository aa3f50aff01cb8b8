"""Fields of OpenAI, vLLM and other servers that would change the answer and that the embedded server does not support.

Each is refused by name, unless its value is one that changes nothing. Fields in no table of ours are accepted: clients
send many that concern only their own provider.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from server.errors import UnsupportedFieldError

_TOOLS: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
_OPENAI = {
    "audio": (),
    "modalities": ([], ["text"]),
    "prediction": (),
    "moderation": (),
    "reasoning": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
_VLLM = {
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
}
_OTHER_SERVERS = {
    "lora": ([],),
    "lora_path": (),
    "lora_request": (),
    "adapter_id": (),
    "grammar": ("",),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "typical_p": (1,),
    "typ_p": (1,),
    "top_a": (0,),
    "tfs_z": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "samplers": (),
    "n_predict": (-1,),
    "min_new_tokens": (0,),
    "max_new_tokens": (),
}
_MISPLACED = {
    name: f"it belongs inside steering, as steering.{name}"
    for name in ("atoms", "preset", "experiment", "max_kl", "on_exceed", "allow_out_of_range")
} | {
    "mix": 'write "steering": {"atoms": {"name": 1.0}}',
    "extra_body": "it is an argument of the Python SDK; put its fields at the top level of the body",
}

COMMON: Mapping[str, tuple[object, ...]] = MappingProxyType(_TOOLS | _OPENAI | _VLLM | _OTHER_SERVERS)
_READ_IN_CHATS = ("tools", "tool_choice", "parallel_tool_calls")
CHAT = MappingProxyType(
    {name: neutral for name, neutral in COMMON.items() if name not in _READ_IN_CHATS}
    | {"add_special_tokens": (False,), "prompt": ()}
)
RESPONSES = MappingProxyType({
    **COMMON, "previous_response_id": (), "conversation": (), "background": (False,), "include": ([],),
    "truncation": ("disabled",), "prompt": (), "max_tool_calls": (), "top_logprobs": (0,), "prompt_template": (),
    "stream_options": ({},), "messages": (), "max_tokens": (), "max_completion_tokens": (), "response_format": (), "n": (1,),
    "logprobs": (False,),
})  # fmt: skip
COMPLETIONS = MappingProxyType({
    **COMMON, "add_special_tokens": (True,), "messages": (), "top_logprobs": (), "max_completion_tokens": (),
})  # fmt: skip


def refuse_unsupported(body: Mapping[str, object], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Raises UnsupportedFieldError for the first field of `body` that is not supported and not neutral."""
    for name, value in body.items():
        if value is None:
            continue
        if name in _MISPLACED:
            raise UnsupportedFieldError(f"{name} at the top level would be ignored: {_MISPLACED[name]}", name)
        if name in neutral and not _is_neutral(value, neutral[name]):
            raise UnsupportedFieldError(f"{name} is not supported by this server; leave it out", name)


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Equality that tells True from 1 and takes 1.0 for 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
