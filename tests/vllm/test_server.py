"""The whole of it: vLLM's own server with our entry points, the real model in fp32, the real OpenAI SDK."""

from __future__ import annotations

import asyncio
import json
import urllib.error

import pytest
import torch
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from transformers import DynamicCache, PreTrainedModel

from atoms.adapter import Delta
from atoms.model import find_linear, merge_adapter
from atoms.package import Package

TOKENS = 12
NEAR_TIE = 1e-4
BLOCK = 128
"""Tokens of a block of vLLM's cache on CPUs."""


@pytest.fixture
def client(server):
    with OpenAI(base_url=server.v1, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def mixes(real_package: Package) -> list[dict[str, float]]:
    ids = [card.id for card in real_package.manifest.atoms]
    return [{}, {ids[0]: 3.0}, {ids[0]: -3.0}, {}, {ids[-1]: 3.0, ids[0]: 1.5}, {ids[-1]: -2.5}]


def steered(atoms: dict[str, float]) -> dict:
    return {"steering": {"atoms": atoms}}


def texts_of(answers: list[dict]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


def test_unsteered_is_bit_equal_to_stock_vllm_on_merged_weights(stock_answers, server, prompts, ask) -> None:
    """Log-probabilities are compared as printed in full: one rounding of one weight would show. First in the file, and
    with its fixtures in this order, so that one engine runs at a time."""
    ours = [ask(server, prompt, logprobs=5) for prompt in prompts]
    assert texts_of(ours) == texts_of(stock_answers)
    for mine, stock in zip(ours, stock_answers, strict=True):
        assert mine["choices"][0]["logprobs"] == stock["choices"][0]["logprobs"]


def test_steered_answers_are_those_of_the_merged_model(server, real_package, load_smol, prompts, mixes, ask) -> None:
    """Greedy tokens against transformers with the mix merged into the weights; near-ties may part."""
    changed = 0
    for mix in mixes[:3] + mixes[4:]:
        model = merged_with(real_package, load_smol(), mix)
        for prompt in prompts[:2]:
            ours = ask(server, prompt, **steered(mix))["choices"][0]["token_ids"]
            reference, gaps = greedy(model, prompt)
            place = first_difference(ours, reference)
            assert place is None or gaps[place] <= NEAR_TIE, (
                f"{mix}: differs at {place}, where the gap is {gaps[place]}"
            )
            unsteered = ask(server, prompt)["choices"][0]["token_ids"]
            changed += bool(mix) and ours != unsteered
    assert changed >= 3, "hardly any mix changed an answer, so equality would prove little"


async def test_a_batch_of_mixes_answers_as_each_does_alone(server, prompts, mixes) -> None:
    async with AsyncOpenAI(base_url=server.v1, api_key="none") as client:

        async def ask(mix: dict[str, float], prompt: list[int]):
            answer = await client.completions.create(
                model=server.name, prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=2,
                extra_body=steered(mix) | {"return_token_ids": True},
            )  # fmt: skip
            return answer.choices[0]

        pairs = [(mix, prompt) for mix in mixes for prompt in prompts[:3]]
        alone = [await ask(*pair) for pair in pairs]
        together = await asyncio.gather(*(ask(*pair) for pair in pairs))
    for pair, one, other in zip(pairs, alone, together, strict=True):
        place = first_difference(one.token_ids, other.token_ids)
        if place is not None:
            best, second = sorted(one.logprobs.top_logprobs[place].values(), reverse=True)[:2]
            assert best - second <= NEAR_TIE, f"{pair} differs at {place}"
    assert len({tuple(one.token_ids) for one in alone}) > len(prompts), "no mix changed an answer"


def test_the_echo_the_headers_and_the_name(server, client, real_package, mixes) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=server.name, messages=[{"role": "user", "content": "Hi"}], max_tokens=4,
        extra_body=steered(mixes[1]) | {"ignore_eos": True},
    )  # fmt: skip
    answer = raw.parse()
    digest = real_package.digest(real_package.mix(mixes[1]))
    assert answer.steering["atoms"] == mixes[1]
    assert answer.steering["mix"] == raw.headers["x-atomsteer-mix"] == digest
    assert answer.model == server.name and answer.usage.completion_tokens == 4


def test_a_stream_is_the_whole_answer_with_the_echo_first(server, client, mixes) -> None:
    ask = {"model": server.name, "messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": TOKENS,
           "temperature": 0, "extra_body": steered(mixes[1])}  # fmt: skip
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].steering["atoms"] == mixes[1] and not hasattr(chunks[1], "steering")
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_n_logprobs_and_seeds(server, client, mixes) -> None:
    ask = {"model": server.name, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 6, "n": 3,
           "seed": 5, "logprobs": True, "top_logprobs": 2, "extra_body": steered(mixes[2]) | {"ignore_eos": True}}  # fmt: skip
    first, second = client.chat.completions.create(**ask), client.chat.completions.create(**ask)
    assert len(first.choices) == 3
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    assert all(len(c.logprobs.content) == 6 and len(c.logprobs.content[0].top_logprobs) == 2 for c in first.choices)


def test_a_json_schema_holds_under_steering(server, client, mixes) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"],
              "additionalProperties": False}  # fmt: skip
    answer = client.chat.completions.create(
        model=server.name, messages=[{"role": "user", "content": "Which colour is grass?"}], max_tokens=40, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}, extra_body=steered(mixes[1]),
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "green")


def test_the_responses_api_whole_and_streamed(server, client, mixes) -> None:
    ask = {"model": server.name, "input": "Name three fruits.", "max_output_tokens": TOKENS, "temperature": 0,
           "extra_body": steered(mixes[1])}  # fmt: skip
    whole = client.responses.create(**ask)
    events = list(client.responses.create(**ask, stream=True))
    assert whole.steering["atoms"] == mixes[1] and whole.model == server.name
    assert events[0].type == "response.created" and events[0].response.steering["atoms"] == mixes[1]
    assert events[-1].response.output_text == whole.output_text
    chat = client.chat.completions.create(
        model=server.name, messages=[{"role": "user", "content": "Name three fruits."}], max_tokens=TOKENS, temperature=0,
        extra_body=steered(mixes[1]),
    )  # fmt: skip
    assert whole.output_text == chat.choices[0].message.content, "the mix did not reach the engine"


def test_anthropics_messages_are_steered_too(server, send, mixes) -> None:
    body = {"model": server.name, "max_tokens": TOKENS, "temperature": 0,
            "messages": [{"role": "user", "content": "Name three fruits."}]}  # fmt: skip
    plain, other = send(server, "/v1/messages", body), send(server, "/v1/messages", body | steered(mixes[1]))
    assert other["steering"]["atoms"] == mixes[1]
    chat = send(server, "/v1/chat/completions", body | steered(mixes[1]))
    assert other["content"][0]["text"] == chat["choices"][0]["message"]["content"] != plain["content"][0]["text"]


def test_presets_are_models(server, client, prompts, ask, real_package, mixes) -> None:
    listed = {model.id: model for model in client.models.list()}
    name = f"{server.name}:strong"
    assert set(listed) == {server.name, name} and listed[name].parent == server.name
    atom = real_package.manifest.atoms[0].id
    answer = ask(server, prompts[0], model=name)
    assert answer["model"] == name and answer["steering"]["preset"] == "strong"
    assert (
        answer["choices"][0]["token_ids"] == ask(server, prompts[0], **steered({atom: 3.0}))["choices"][0]["token_ids"]
    )


def test_errors_have_openai_form_and_the_engine_lives_on(server, client, prompts, ask) -> None:
    with pytest.raises(NotFoundError, match="unknown atom 'nope'"):
        client.chat.completions.create(model=server.name, messages=[{"role": "user", "content": "x"}],
                                       extra_body=steered({"nope": 1}))  # fmt: skip
    with pytest.raises(NotFoundError, match="model"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(BadRequestError, match="strength"):
        client.completions.create(model=server.name, prompt="x", extra_body={"steering": {"strength": 1}})
    with pytest.raises(BadRequestError):
        client.completions.create(model=server.name, prompt="x", max_tokens=100_000)
    assert ask(server, prompts[0])["choices"][0]["token_ids"]


def test_a_cached_prefix_is_not_shared_between_mixes(server, smol_tokenizer, mixes, ask, chat_prompt, read) -> None:
    """Two passes over a long shared prompt: the second reads the cache, and must answer as the first."""
    prompt = chat_prompt("Here is a list of words. " + "apple pear plum " * 60 + "Name three of them.")
    before = cache_hits(read(server, "/metrics"))
    first = [ask(server, prompt, **steered(mix)) for mix in mixes]
    between = cache_hits(read(server, "/metrics"))
    second = [ask(server, prompt, **steered(mix)) for mix in mixes]
    assert texts_of(second) == texts_of(first)
    assert cache_hits(read(server, "/metrics")) - between >= len(mixes) * 100, "the second pass did not read the cache"
    assert between - before <= 200, "different mixes shared a prefix (only the two unsteered requests may)"


def test_phase_decode_is_an_unsteered_prompt_and_a_steered_answer(
    server, real_package, load_smol, prompts, mixes, chat_prompt, ask
) -> None:
    """Against transformers: the unsteered model reads all but the prompt's last token, the steered one goes on. Prompts
    within a block and over several, read anew and from the cache, and beside the same mix in the other phase."""
    long = chat_prompt("Here is a list of words. " + "apple pear plum " * 40 + "Name three of them.")
    plain = merged_with(real_package, load_smol(), {})
    differing = 0
    for mix in (mixes[1], mixes[4]):
        model = merged_with(real_package, load_smol(), mix)
        for prompt in (prompts[0], long, long):
            whole = ask(server, prompt, TOKENS, **steered(mix))["choices"][0]["token_ids"]
            ours = ask(server, prompt, TOKENS, steering={"atoms": mix, "phase": "decode"})
            assert ours["steering"]["phase"] == "decode" and ours["steering"]["mix"].endswith("-decode")
            reference, gaps = greedy_after(plain, model, prompt)
            place = first_difference(ours["choices"][0]["token_ids"], reference)
            assert place is None or gaps[place] <= NEAR_TIE, f"{mix} differs at {place}, where the gap is {gaps[place]}"
            differing += whole != reference
    assert differing, "no answer depends on how the prompt was read, so this shows nothing"


async def test_phases_and_mixes_in_one_batch_answer_as_alone(server, prompts, mixes, chat_prompt) -> None:
    long = chat_prompt("Here is another list. " + "bread salt milk " * 40 + "Name two of them.")
    async with AsyncOpenAI(base_url=server.v1, api_key="none") as client:

        async def ask(mix: dict[str, float], phase: str, prompt: list[int]):
            answer = await client.completions.create(
                model=server.name, prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=2,
                extra_body={"steering": {"atoms": mix, "phase": phase}, "return_token_ids": True},
            )  # fmt: skip
            return answer.choices[0]

        cases = [
            (mix, phase, prompt) for mix in mixes[:3] for phase in ("all", "decode") for prompt in (prompts[0], long)
        ]
        together = await asyncio.gather(*(ask(*case) for case in cases))
        alone = [await ask(*case) for case in cases]
    for case, one, other in zip(cases, alone, together, strict=True):
        place = first_difference(one.token_ids, other.token_ids)
        if place is not None:
            best, second = sorted(one.logprobs.top_logprobs[place].values(), reverse=True)[:2]
            assert best - second <= NEAR_TIE, f"{case} differs at {place}"


def test_phase_decode_shares_the_prompt_of_all_mixes_and_no_answer(
    server, real_package, load_smol, mixes, ask, chat_prompt, read
) -> None:
    """The next turn of a conversation has the answer in its prompt, where it is read unsteered: the blocks that the
    steered answer has left in the cache must not serve it."""
    prompt = chat_prompt("Here is a third list. " + "tea rice corn " * 110 + "Name three of them.")
    ask(server, prompt)
    before = cache_hits(read(server, "/metrics"))
    answers = [ask(server, prompt, 40, steering={"atoms": mix, "phase": "decode"}, ignore_eos=True)
               for mix in (mixes[1], mixes[4])]  # fmt: skip
    hits = cache_hits(read(server, "/metrics")) - before
    assert hits >= 2 * (len(prompt) - 1 - BLOCK), "the unsteered prompt was read again"
    assert len(prompt) % BLOCK + 40 > BLOCK, "the answers fill no block, so none could be shared"
    plain = merged_with(real_package, load_smol(), {})
    for mix, answer in zip((mixes[1], mixes[4]), answers, strict=True):
        turn = [*prompt, *answer["choices"][0]["token_ids"], *prompt[-8:]]
        ours = ask(server, turn, TOKENS, steering={"atoms": mix, "phase": "decode"})["choices"][0]["token_ids"]
        reference, gaps = greedy_after(plain, merged_with(real_package, load_smol(), mix), turn)
        place = first_difference(ours, reference)
        assert place is None or gaps[place] <= NEAR_TIE, f"{mix} differs at {place}, where the gap is {gaps[place]}"


def test_our_routes_answer_on_the_same_port(server, send, read, real_package, mixes) -> None:
    atoms = json.loads(read(server, "/v1/atoms"))
    assert [card["id"] for card in atoms["data"]] == [card.id for card in real_package.manifest.atoms]
    preview = send(server, "/v1/steering/preview", steered(mixes[1]))
    assert preview["steering"]["atoms"] == mixes[1]
    assert json.loads(read(server, "/ready"))["steering"]["active"] is True
    assert json.loads(read(server, "/version"))["package"] == server.name


def test_metrics_are_vllms_and_ours_without_a_series_for_every_mix(server, read, prompts, ask, mixes) -> None:
    ask(server, prompts[0], **steered(mixes[1]))
    text = read(server, "/metrics")
    assert "vllm:generation_tokens_total" in text and "atomsteer_atom_requests_total" in text
    assert 'atomsteer_requests_total{arm="",experiment="",preset="",status="200"}' in text
    assert "running_lora_adapters=" not in text


def test_more_distinct_mixes_than_slots_are_all_right(server, real_package, prompts) -> None:
    """40 mixes never seen before on 16 slots, at once; some then once more alone."""
    atom = real_package.manifest.atoms[0].id
    values = [round(-2.5 + index / 8, 4) for index in range(40)]

    async def run() -> tuple[list, list]:
        async with AsyncOpenAI(base_url=server.v1, api_key="none") as client:

            async def ask(value: float):
                answer = await client.completions.create(
                    model=server.name,
                    prompt=prompts[0],
                    max_tokens=4,
                    temperature=0,
                    logprobs=2,
                    extra_body=steered({atom: value}),
                )
                return answer.choices[0].logprobs

            together = await asyncio.gather(*(ask(value) for value in values))
            return together, [await ask(value) for value in values[::10]]

    together, alone = asyncio.run(run())
    for one, other in zip(alone, together[::10], strict=True):
        place = first_difference(one.tokens, other.tokens)
        best = None if place is None else sorted(one.top_logprobs[place].values(), reverse=True)
        assert place is None or (best is not None and best[0] - best[1] <= NEAR_TIE)
        assert one.token_logprobs[0] == pytest.approx(other.token_logprobs[0], abs=1e-3)
    assert len({answer.token_logprobs[0] for answer in together}) > 30, "mixes shared an adapter"


def test_training_documents_need_an_admin_key(server, read) -> None:
    atom = json.loads(read(server, "/v1/atoms"))["data"][0]["id"]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        read(server, f"/v1/atoms/{atom}/documents")


def merged_with(package: Package, model: PreTrainedModel, mix: dict[str, float]) -> PreTrainedModel:
    """`model` with θ0 and the mix's delta in its weights."""
    merge_adapter(model, package.base_adapter)
    delta: Delta = package.bank.compose(package.mix(mix), package.composition) or {}
    for name, factors in delta.items():
        weight = find_linear(model, name).weight
        weight += factors.scaling * (factors.lora_B @ factors.lora_A)
    return model


def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens of a greedy continuation, and the gap between the two best logits at each."""
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0,
    )  # fmt: skip
    best = [logits[0].topk(2).values for logits in output.logits]
    return output.sequences[0, len(prompt) :].tolist(), [float(values[0] - values[1]) for values in best]


@torch.inference_mode()
def greedy_after(reader: PreTrainedModel, writer: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """As `greedy`, where `reader` reads all but the prompt's last token and `writer` goes on from there."""
    cache, tokens, gaps = DynamicCache(), [prompt[-1]], []
    reader(input_ids=torch.tensor([prompt[:-1]]), past_key_values=cache)
    for _ in range(TOKENS):
        best = writer(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return tokens[1:], gaps


def first_difference(one: list, other: list) -> int | None:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def cache_hits(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
