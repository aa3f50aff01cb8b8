"""Which of a package's linears can be steered in vLLM's model, which does not call each of them with the checkpoint's weights.

Knows names and torch's modules, and imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

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


def require_modules(names: Mapping[str, str], found: Collection[str], model: nn.Module, placeholder: type) -> None:
    """Raises AdapterError if `model` has not all that it should of the linears called `names` (vLLM's name -> the package's);
    `found` are the package's names of those that it has. What a module of type `placeholder` stands for another rank of the
    pipeline has."""
    missing = sorted(
        own for name, own in names.items() if own not in found and not isinstance(_nearest(model, name), placeholder)
    )
    if missing:
        raise AdapterError(f"vLLM's {type(model).__name__} has no linear for {missing[0]} ({len(missing)} of the package's "
                           "modules); it cannot be steered there, use the embedded engine")  # fmt: skip


def _nearest(model: nn.Module, name: str) -> nn.Module:
    """The module `name`, or the innermost that there is of those which should contain it."""
    module = model
    for part in name.split("."):
        inner = getattr(module, part, None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def _refuse(name: str, why: str) -> None:
    raise AdapterError(
        f"{name} {why} cannot be steered inside vLLM; use the embedded engine, or train an adapter without it"
    )
