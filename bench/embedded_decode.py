"""Decode throughput of the embedded engine: 16 rows with 16 different mixes against 16 unsteered rows.

    OMP_WAIT_POLICY=PASSIVE python -m bench.embedded_decode MODEL [--rows 16] [--tokens 32] [--rank 8] [--rounds 3]

Random deltas on q_proj and v_proj cost what real ones do. Steered and unsteered rounds alternate, so that what else
runs on the machine meets both; the ratio is of the best rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atoms.adapter import Delta, Factors
from atoms.engine import GenerationRequest, SamplingParams
from atoms.mix import Mix
from atoms.model import choose_device, choose_dtype
from atoms.space import LoRAModule, LoRASpace
from server.embedded.engine import EmbeddedEngine


def random_delta(space: LoRASpace, mix: Mix) -> Delta | None:
    """A small random delta of rank 2r, as a composed mix has; None for the empty mix."""
    if not mix:
        return None
    generator = torch.Generator().manual_seed(mix.steps[0][1])
    return {
        module.name: Factors(
            torch.randn(2 * module.rank, module.d_in, generator=generator) / module.d_in**0.5,
            torch.randn(module.d_out, 2 * module.rank, generator=generator) * 0.01,
            module.scaling,
        )
        for module in space.modules
    }


def tokens_per_second(engine: EmbeddedEngine, rows: int, tokens: int, steered: bool) -> float:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    requests = [
        GenerationRequest(
            str(row),
            engine.encode_text(f"Question {row}: how does one bake bread?"),
            Mix.of({"atom": row + 1}) if steered else Mix(),
            sampling,
        )
        for row in range(rows)
    ]
    start = time.perf_counter()
    engine.generate(requests)
    return rows * tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, default in (("rows", 16), ("tokens", 32), ("rank", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = choose_device()
    dtype = choose_dtype(device)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    linears = [(name, module) for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    space = LoRASpace.of(LoRAModule(name, m.in_features, m.out_features, args.rank, 1.0) for name, m in linears)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    engine = EmbeddedEngine(model, tokenizer, space, lambda mix: random_delta(space, mix), slots=args.rows)
    tokens_per_second(engine, args.rows, 4, steered=True)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.rounds):
        for steered in rates:
            rates[steered].append(tokens_per_second(engine, args.rows, args.tokens, steered))
    engine.close()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {dtype}")
    for steered, values in rates.items():
        print(f"{'steered' if steered else 'unsteered':>9}: {' '.join(f'{value:.1f}' for value in values)} tok/s")
    print(f"    ratio: {max(rates[True]) / max(rates[False]):.2f} ({args.rows} rows, prefill included)")


if __name__ == "__main__":
    main()
