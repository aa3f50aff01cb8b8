"""Throughput of the embedded engine: unsteered, every row with its own mix, and transformers' `generate` one by one.

    OMP_WAIT_POLICY=PASSIVE python bench/embedded_decode.py MODEL [--rows 16] [--tokens 32] [--rounds 8] [--json FILE]

Random deltas on q_proj and v_proj cost what real ones do. The cells of a round follow one another, so that what else
runs on the machine meets all of them; ratios are of the same round, with the median and a 95% interval (of the median,
by order statistics). Prefill is included. `plain` is the engine without packed weights (server/embedded/packing.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import binom
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from atoms.adapter import Delta, Factors
from atoms.engine import GenerationRequest, SamplingParams
from atoms.mix import Mix
from atoms.model import choose_device, choose_dtype
from atoms.space import LoRAModule, LoRASpace
from server.embedded.engine import EmbeddedEngine
from server.embedded.packing import pack_linears

PROMPT = "Question {}: how does one bake bread?"
RATIOS = (("steered", "unsteered"), ("unsteered", "plain"), ("unsteered", "generate"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, default in (("rows", 16), ("tokens", 32), ("rank", 8), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates = measure(args)
    ratios = {f"{a} / {b}": interval([x / y for x, y in zip(rates[a], rates[b], strict=True)]) for a, b in RATIOS}
    machine = f"{processor()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    print(machine)
    for cell, values in rates.items():
        print(f"{cell:>10}: median {statistics.median(values):6.1f} tokens/s")
    for name, (low, middle, high) in ratios.items():
        print(f"{name:>22}: {middle:.2f} [{low:.2f}, {high:.2f}]  ({args.rounds} rounds, {args.rows} rows)")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rates": rates, "ratios": ratios}, indent=1) + "\n")


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of every cell, one value a round."""
    device = choose_device()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=choose_dtype(device)).to(device).eval()
    linears = [(name, module) for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    space = LoRASpace.of(LoRAModule(name, m.in_features, m.out_features, args.rank, 1.0) for name, m in linears)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    hosts = {"plain": copy.deepcopy(model), "packed": copy.deepcopy(model)}
    pack_linears(hosts["packed"])
    engines = {
        name: EmbeddedEngine(host, tokenizer, space, lambda mix: random_delta(space, mix), slots=args.rows)
        for name, host in hosts.items()
    }
    cells: dict[str, Callable[[], float]] = {
        "generate": lambda: one_by_one(model, tokenizer, args),
        "plain": lambda: engine_rate(engines["plain"], args, steered=False),
        "unsteered": lambda: engine_rate(engines["packed"], args, steered=False),
        "steered": lambda: engine_rate(engines["packed"], args, steered=True),
    }
    for cell in cells.values():
        cell()
    rates = {name: [] for name in cells}
    for _ in range(args.rounds):
        for name, cell in cells.items():
            rates[name].append(cell())
    for engine in engines.values():
        engine.close()
    return rates


def engine_rate(engine: EmbeddedEngine, args: argparse.Namespace, *, steered: bool) -> float:
    """Tokens a second of `rows` requests at once."""
    sampling = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
    requests = [
        GenerationRequest(str(row), engine.encode_text(PROMPT.format(row)),
                          Mix.of({"atom": row + 1}) if steered else Mix(), sampling)
        for row in range(args.rows)
    ]  # fmt: skip
    start = time.perf_counter()
    engine.generate(requests)
    return args.rows * args.tokens / (time.perf_counter() - start)


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, tokenizer, args: argparse.Namespace) -> float:
    """Tokens a second of a quarter of the requests, one after another, without steering."""
    count = max(1, args.rows // 4)
    start = time.perf_counter()
    for row in range(count):
        inputs = tokenizer(PROMPT.format(row), return_tensors="pt").to(model.device)
        model.generate(
            **inputs, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0
        )
    return count * args.tokens / (time.perf_counter() - start)


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


def interval(values: list[float]) -> tuple[float, float, float]:
    """(low, median, high): the widest order statistics that cover the median with 95%, or the extremes of few values."""
    ordered, n = sorted(values), len(values)
    rank = max(0, int(binom.ppf(0.025, n, 0.5)) - 1)
    return ordered[rank], statistics.median(ordered), ordered[n - 1 - rank]


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
