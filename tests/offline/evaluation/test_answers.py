"""Answers are generated once: whatever is on the disk is read back, whatever is not is asked for again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atoms.engine import Generation, SamplingParams
from atoms.errors import ConfigError, DataError, StorageError
from atoms.mix import Mix
from offline.evaluation.answers import Answerer, AnswerLog, Decoding, Question

STEERED = Mix.of({"a-00000001": 1.0})


class Echo:
    """Says which prompt and mix it was asked for with."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.sampling: dict[str, SamplingParams] = {}

    def encode_chat(self, messages):
        return tuple(messages[-1]["content"].encode())

    def generate(self, requests):
        self.asked += [request.request_id for request in requests]
        self.sampling |= {bytes(r.prompt_token_ids).decode() + str(dict(r.mix)): r.sampling for r in requests}
        return [Generation(r.request_id, f"{bytes(r.prompt_token_ids).decode()} {dict(r.mix)} {r.sampling.max_tokens}", (1, 2), "stop")
                for r in requests]  # fmt: skip


def digest(mix: Mix) -> str:
    return str(mix.steps)


def answerer(engine: Echo, log: AnswerLog | None, identity: str = "float32", **decoding) -> Answerer:
    return Answerer(engine, digest, Decoding(**{"max_tokens": 8} | decoding), log, identity)  # type: ignore[arg-type]


def test_answers_come_in_order_and_once(tmp_path: Path) -> None:
    engine, advanced = Echo(), []
    asked = answerer(engine, AnswerLog(tmp_path / "log.jsonl"))
    lists = asked.answer(["p", "q", "p"], [Mix(), STEERED], advanced.append)
    assert [[a.text for a in answers] for answers in lists] == [
        [f"{p} {dict(mix)} 8" for p in ("p", "q", "p")] for mix in (Mix(), STEERED)
    ]
    assert len(engine.asked) == 4, "a prompt that occurs twice is answered once"
    assert sum(advanced) >= 4


def test_a_second_run_asks_for_nothing(tmp_path: Path) -> None:
    first = answerer(Echo(), AnswerLog(tmp_path / "log.jsonl")).answer(["p", "q"], [Mix(), STEERED])
    engine = Echo()
    assert answerer(engine, AnswerLog(tmp_path / "log.jsonl")).answer(["p", "q"], [Mix(), STEERED]) == first
    assert engine.asked == []


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 9}, {"identity": "bfloat16"}, {"temperature": 0.7}],
    ids=["max_tokens", "dtype", "temperature"],
)
def test_another_setting_is_another_answer(tmp_path: Path, change: dict) -> None:
    answerer(Echo(), AnswerLog(tmp_path / "log.jsonl")).answer(["p"], [Mix()])
    engine = Echo()
    answerer(engine, AnswerLog(tmp_path / "log.jsonl"), **change).answer(["p"], [Mix()])
    assert len(engine.asked) == 1


@pytest.mark.parametrize("change", [{"temperature": 0.8}, {"top_p": 0.9}, {"seed": 1}], ids=lambda c: next(iter(c)))
def test_another_way_of_sampling_is_another_answer(tmp_path: Path, change: dict) -> None:
    sampled = {"temperature": 0.7, "top_p": 0.95, "seed": 0}
    answerer(Echo(), AnswerLog(tmp_path / "log.jsonl"), **sampled).answer(["p"], [Mix()])
    engine = Echo()
    answerer(engine, AnswerLog(tmp_path / "log.jsonl"), **sampled | change).answer(["p"], [Mix()])
    assert len(engine.asked) == 1


def test_greedy_answers_have_no_seed(tmp_path: Path) -> None:
    answerer(Echo(), AnswerLog(tmp_path / "log.jsonl")).answer(["p"], [Mix()])
    engine = Echo()
    answerer(engine, AnswerLog(tmp_path / "log.jsonl"), seed=7).answer(["p"], [Mix()])
    assert engine.asked == []


def test_a_prompt_is_sampled_with_one_seed_under_every_mix() -> None:
    engine = Echo()
    answerer(engine, None, temperature=0.7, top_p=0.95).answer(["p", "q"], [Mix(), STEERED])
    plain, other = engine.sampling[f"p{dict(Mix())}"], engine.sampling[f"q{dict(Mix())}"]
    assert engine.sampling[f"p{dict(STEERED)}"] == plain
    assert plain.seed != other.seed
    assert (plain.temperature, plain.top_p) == (0.7, 0.95)


def test_further_samples_have_seeds_of_their_own_whatever_the_seed() -> None:
    seeds = {Decoding(8, temperature=0.7, seed=seed).sampling("p", n).seed for seed in range(5) for n in range(5)}
    assert len(seeds) == 25, "two runs with other seeds share answers"
    assert Decoding(8, temperature=0.7).sampling("p", 0) == Decoding(8, temperature=0.7).sampling("p")


def test_further_samples_are_kept_apart_in_the_log(tmp_path: Path) -> None:
    questions = [Question("p", Mix(), n) for n in range(3)]
    engine = Echo()
    answerer(engine, AnswerLog(tmp_path / "log.jsonl"), temperature=0.7).answer_questions(questions)
    assert len(engine.asked) == len(set(engine.asked)) == 3
    answerer(engine, AnswerLog(tmp_path / "log.jsonl"), temperature=0.7).answer_questions(questions[1:])
    answerer(engine, AnswerLog(tmp_path / "log.jsonl"), temperature=0.7).answer(["p"], [Mix()])
    assert len(engine.asked) == 3, "the log has them"


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be within 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 0.9}, "top_p is 0.9, but temperature 0 is greedy"),
    ],
)
def test_a_decoding_that_cannot_be_is_refused(change: dict, limit: str) -> None:
    with pytest.raises(ConfigError, match=limit):
        Decoding(**change)


def test_a_torn_line_is_dropped_and_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    whole = answerer(Echo(), AnswerLog(file)).answer(["p", "q"], [Mix()])
    file.write_bytes(file.read_bytes()[:-9])
    engine = Echo()
    assert answerer(engine, AnswerLog(file)).answer(["p", "q"], [Mix()]) == whole
    assert len(engine.asked) == 1
    assert len(AnswerLog(file)) == 2, "the log is whole again"


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"key": "k"}\nnonsense\n')
    with pytest.raises(DataError, match=r"log\.jsonl, line 2"):
        AnswerLog(file)


def test_a_log_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="taken"):
        answerer(Echo(), AnswerLog(tmp_path / "taken" / "log.jsonl")).answer(["p"], [Mix()])


KILLED = """
import sys, time
from atoms.engine import Generation
from atoms.mix import Mix
from offline.evaluation import answers
answers._BATCH = 4
class Slow:
    def encode_chat(self, messages): return tuple(messages[-1]["content"].encode())
    def generate(self, requests):
        time.sleep(0.05)
        print(len(requests), flush=True)
        return [Generation(r.request_id, "text", (1,), "stop") for r in requests]
answers.Answerer(Slow(), str, answers.Decoding(8), answers.AnswerLog(__import__("pathlib").Path(sys.argv[1]))).answer([str(n) for n in range(400)], [Mix()])
"""


def test_a_kill_loses_at_most_a_batch(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    generated = sum(int(process.stdout.readline()) for _ in range(6))
    os.kill(process.pid, signal.SIGKILL)
    rest = process.communicate()[0].split()
    generated += sum(map(int, rest))
    kept = AnswerLog(file)
    assert generated - 4 <= len(kept) <= generated < 400
    keys = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    assert len(set(keys)) == len(keys) == len(kept)
