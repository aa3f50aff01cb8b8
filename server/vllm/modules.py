"""Which of a package's linears can be steered in vLLM's model, which does not call each of them with the checkpoint's weights.

Knows names and torch's modules, and imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from atoms.errors import AdapterError

_PERMUTES = "permute_qk_weight_for_rotary"  # the method of vLLM's Llama 4 that does so while weights are loaded


def refuse_modules(names: Iterable[str], model: nn.Module) -> None:
    """Raises AdapterError for the first of a package's `names` whose steering vLLM's `model` would drop, or would add to
    other outputs than the checkpoint's."""
    permutes = any(hasattr(module, _PERMUTES) for module in model.modules())
    for name in names:
        if ".experts." in name:
            _refuse(name, "belongs to a mixture of experts, which")
        if name.endswith(".kv_b_proj"):  # decoding multiplies by what was made of its weights when they were loaded
            _refuse(name, "is absorbed into vLLM's attention (MLA), so that it")
        if permutes and name.endswith((".q_proj", ".k_proj")):
            _refuse(name, f"has its outputs in another order in vLLM's {type(model).__name__}, so that it")


def _refuse(name: str, why: str) -> None:
    raise AdapterError(
        f"{name} {why} cannot be steered inside vLLM; use the embedded engine, or train an adapter without it"
    )
