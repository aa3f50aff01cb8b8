"""Which of a package's linears can be steered in vLLM's model, which does not call each of them with the checkpoint's weights.

Knows names alone, and nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable

from atoms.errors import AdapterError


def refuse_modules(names: Iterable[str]) -> None:
    """Raises AdapterError for the first of a package's `names` whose steering vLLM's model would drop."""
    for name in names:
        if ".experts." in name:
            _refuse(name, "belongs to a mixture of experts, which")
        if name.endswith(".kv_b_proj"):  # decoding multiplies by what was made of its weights when they were loaded
            _refuse(name, "is absorbed into vLLM's attention (MLA), so that it")


def _refuse(name: str, why: str) -> None:
    raise AdapterError(
        f"{name} {why} cannot be steered inside vLLM; use the embedded engine, or train an adapter without it"
    )
