"""Throughput of the embedded engine with mixes, without its packed weights, and of `generate` one request at a time.

    OMP_WAIT_POLICY=ACTIVE GOMP_SPINCOUNT=2000 python -m bench.embedded_decode MODEL [--cells 16x3 generate] [--json FILE]

A cell KxJ has K distinct mixes of J atoms each, all never seen before, over the rows; 0x0 is the engine against itself.
`steps` compares single decode steps of two batches on one model, 16 mixes of 3 atoms against none, one step of each in
turn: what else runs on the machine meets both alike, so it tells small differences that whole answers do not. `plain` is
the engine without packed weights (server/embedded/packing.py). Random atoms on q_proj and v_proj cost what real ones do.

The other cells are measured in pairs with the unsteered engine, in turns which goes first; composing and prefill are
included. The figure is the ratio to the unsteered engine, with the median and a 95% interval (by order statistics).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import binom
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from atoms.adapter import Adapter, AtomBank
from atoms.engine import GenerationRequest, SamplingParams
from atoms.machine import machine
from atoms.mix import Mix
from atoms.model import DTYPES, choose_device, choose_dtype
from atoms.space import LoRAModule, LoRASpace
from atoms.steered import PackedBank, SteeredModel
from server.embedded.attention import group_heads
from server.embedded.batcher import Batcher, Job
from server.embedded.detokenize import TokenBytes
from server.embedded.engine import EmbeddedEngine
from server.embedded.packing import pack_linears

PROMPT = "Question {}: how does one bake bread?"
CELLS = ("0x0", "1x3", "16x3", "16x1", "16x8", "16x32", "steps", "plain", "generate")
BANK = 64
"""Atoms to draw mixes from."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="CELL", help=f"of {', '.join(CELLS)}, or any KxJ")
    for name, default in (("rows", 16), ("tokens", 32), ("rank", 8), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates = measure(args)
    cells = f"{args.dtype}, {args.rows} rows, {args.tokens} tokens, {args.rounds} pairs a cell"
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; {cells}")
    ratios = {}
    for cell, pairs in rates.items():
        low, middle, high = ratios[cell] = interval([rate / base for base, rate in pairs])
        base, rate = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"{cell:>10}: {rate:6.1f} tokens/s, unsteered {base:6.1f}, ratio {middle:.3f} [{low:.3f}, {high:.3f}]")
    if args.json:
        found = {"machine": machine(), "load": os.getloadavg()[0], "rates": rates, "ratios": ratios}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Cell -> (unsteered, its own) tokens a second of every pair."""
    device = choose_device()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=choose_dtype(device, args.dtype)).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    bank = random_bank(model, args.rank)
    packed = PackedBank(bank, "linear", device, model.dtype)

    def engine_on(host: PreTrainedModel) -> EmbeddedEngine:
        return EmbeddedEngine(host, tokenizer, bank.base.space, packed.compose, slots=args.rows)

    cells: dict[str, Callable[[], float]] = {}
    engines = [engine_on(copy.deepcopy(model))]
    pack_linears(engines[0]._batcher._model)
    group_heads(engines[0]._batcher._model)
    draw = random.Random(0)
    for cell in args.cells:
        if cell == "steps":
            continue
        if cell == "generate":
            cells[cell] = lambda: one_by_one(model, tokenizer, args)
        elif cell == "plain":
            engines.append(engine_on(copy.deepcopy(model)))
            cells[cell] = lambda engine=engines[-1]: engine_rate(engine, args, [Mix()])
        else:
            mixes, atoms = (int(number) for number in cell.split("x"))
            cells[cell] = lambda mixes=mixes, atoms=atoms: engine_rate(engines[0], args, new_mixes(draw, mixes, atoms))
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in cells}
    for pair in range(-1, args.rounds):  # the first is a warm-up
        for name, cell in cells.items():
            order = [lambda: engine_rate(engines[0], args, [Mix()]), cell]
            figures = [run() for run in (order if pair % 2 else order[::-1])]
            if pair >= 0:
                rates[name].append((figures[0], figures[1]) if pair % 2 else (figures[1], figures[0]))
    for engine in engines:
        engine.close()
    if "steps" in args.cells:
        pack_linears(model)
        group_heads(model)
        prompts = [tuple(tokenizer(PROMPT.format(row))["input_ids"]) for row in range(args.rows)]
        rates["steps"] = step_rates(model, packed, bank.base.space, TokenBytes(tokenizer), prompts, args)
    return rates


def step_rates(
    model: PreTrainedModel, packed: PackedBank, space: LoRASpace, token_bytes: TokenBytes,
    prompts: list[tuple[int, ...]], args: argparse.Namespace,
) -> list[tuple[float, float]]:  # fmt: skip
    """(unsteered, steered) tokens a second of each pair of decode steps."""
    steps = args.tokens * args.rounds // 4
    sampling = SamplingParams(max_tokens=2 * steps, temperature=0, ignore_eos=True)
    batchers = []
    for mixes in ([Mix()] * len(prompts), new_mixes(random.Random(1), len(prompts), 3)):
        steered = SteeredModel(model, space, args.rows)
        batcher = Batcher(model, steered, packed.compose, frozenset(), 4096, 512, 0)
        for row, (prompt, mix) in enumerate(zip(prompts, mixes, strict=True)):
            batcher.add(
                Job(GenerationRequest(str(row), prompt, mix, sampling), 2 * steps, token_bytes, lambda _delta: None)
            )
        batchers.append(batcher)
    for _ in range(steps // 4):  # all have joined by then
        for batcher in batchers:
            batcher.step()
    pairs = []
    for step in range(steps):
        seconds = [0.0, 0.0]
        for place in (0, 1) if step % 2 else (1, 0):
            start = time.perf_counter()
            batchers[place].step()
            seconds[place] = time.perf_counter() - start
        pairs.append((args.rows / seconds[0], args.rows / seconds[1]))
    return pairs


def new_mixes(draw: random.Random, count: int, atoms: int) -> list[Mix]:
    """`count` mixes of `atoms` atoms each, never drawn before; the empty one for none."""
    drawn = [{f"a{j}": draw.uniform(-2, 2) for j in draw.sample(range(BANK), atoms)} for _ in range(count)]
    return [Mix.of(coefficients) for coefficients in drawn] or [Mix()]


def engine_rate(engine: EmbeddedEngine, args: argparse.Namespace, mixes: list[Mix]) -> float:
    """Tokens a second of `rows` requests at once."""
    sampling = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
    requests = [
        GenerationRequest(str(row), engine.encode_text(PROMPT.format(row)), mixes[row % len(mixes)], sampling)
        for row in range(args.rows)
    ]
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


def random_bank(model: PreTrainedModel, rank: int) -> AtomBank:
    """Small random atoms on q_proj and v_proj."""
    linears = [(name, module) for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    space = LoRASpace.of(LoRAModule(name, m.in_features, m.out_features, rank, 1.0) for name, m in linears)
    generator = torch.Generator().manual_seed(0)

    def direction() -> dict[str, torch.Tensor]:
        return {tensor.key: torch.randn(tensor.shape, generator=generator) * 0.003 for tensor in space.tensors}

    return AtomBank.of(Adapter(space, direction(), {}), {f"a{atom}": direction() for atom in range(BANK)})


def interval(values: list[float]) -> tuple[float, float, float]:
    """(low, median, high): the widest order statistics that cover the median with 95%, or the extremes of few values."""
    ordered, n = sorted(values), len(values)
    rank = max(0, int(binom.ppf(0.025, n, 0.5)) - 1)
    return ordered[rank], statistics.median(ordered), ordered[n - 1 - rank]


if __name__ == "__main__":
    main()
