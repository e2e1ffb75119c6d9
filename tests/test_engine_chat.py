"""Chats: exact ids from turn to turn, system prompts, streaming, interruptions, bad input."""

import json

import pytest
import tokenizers
from tiny_models import random_ids, save_model
from tokenizers import decoders, models, pre_tokenizers

import cachedattn as ca

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_path(tmp_path_factory):
    """A random model over bytes and two special tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    path = tmp_path_factory.mktemp("chat")
    save_model(path, layers=2, vocab_size=258, eos_token_id=257, bos_token_id=256)
    backend.save(str(path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def engine(chat_path):
    store = ca.StoreConfig(dram="24MiB", block_size=16)
    with ca.Engine.from_pretrained(chat_path, store=store, dtype="float32") as engine:
        yield engine


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(reply: ca.Reply) -> dict[str, str]:
    return {"role": "assistant", "content": reply.text}


def sampling(max_tokens: int = 12, **fields: object) -> ca.SamplingParams:
    return ca.SamplingParams(max_tokens=max_tokens, **fields)


def test_the_next_turn_begins_with_the_exact_ids(engine):
    messages = [user("first question")]
    request = engine.add_request(messages, sampling(), conversation="a")
    while not request.finished:
        engine.step()
    messages += [assistant(request.reply()), user("and then?")]
    second = engine.add_request(messages, sampling(), conversation="a")
    assert second.prompt_ids[: len(request.tokens)] == request.tokens
    while not second.finished:
        engine.step()
    assert second.reply().num_cached_tokens == len(request.tokens) - 1
    # The text of the ids is the text of the chat, once the unfinished turn is ended.
    text = engine.tokenizer.decode(second.prompt_ids, skip_special_tokens=False)
    assert text == engine.tokenizer.render(messages)


def play(engine, messages, output, **fields):
    """A turn that is made to generate `output`."""
    request = engine.add_request(messages, sampling(len(output), **fields), conversation="a")
    chosen = iter(output)
    request.sampler = lambda *_: next(chosen)
    while not request.finished:
        engine.step()
    return request


START, END = 256, 257


@pytest.mark.parametrize(
    ("output", "known"),
    [
        ([*b"two", START, *b" words", END], 11),  # the client does not see the special token
        ([*b"two words"], 9),
        ([*b"two words", START], 10),
        ([*b"two\xc3"], 4),  # half a character
        ([*b"two words", 0], 9),  # by a stop token, which no template writes
        ([*b"two wor#ds"], 0),  # by a stop string: the client has less than was generated
    ],
)
def test_what_the_client_does_not_see_costs_no_history(engine, output, known):
    messages = [user("first question")]
    request = play(engine, messages, output, stop=["#"], stop_token_ids=[0])
    messages += [assistant(request.reply()), user("and then?")]
    second = engine.add_request(messages, sampling(), conversation="a")
    count = len(request.prompt_ids) + known
    assert second.prompt_ids[:count] == request.tokens[:count]
    text = engine.tokenizer.decode(second.prompt_ids[count:], skip_special_tokens=False)
    assert engine.tokenizer.render(messages).endswith(text)


def test_an_edited_chat_is_tokenised_again(engine):
    first = engine.chat("a", [user("first question")], sampling())
    edited = [user("first question"), {"role": "assistant", "content": "other"}, user("so?")]
    request = engine.add_request(edited, sampling(), conversation="a")
    rendered = engine.tokenizer.render(edited)
    assert request.prompt_ids == engine.tokenizer.encode(rendered, add_special_tokens=False)
    assert first.token_ids != request.prompt_ids[-12:]


def test_conversations_do_not_mix(engine):
    engine.chat("a", [user("one")], sampling())
    request = engine.add_request([user("two")], sampling(), conversation="b")
    text = engine.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    assert text == engine.tokenizer.render([user("two")])


@pytest.mark.parametrize("keep_system", [False, True])
def test_truncation_keeps_the_system_prompt_when_asked(chat_path, keep_system):
    system = {"role": "system", "content": "Answer as the keeper of a lighthouse. " * 2}
    truncation = ca.Truncation(keep_first=0, keep_system=keep_system)
    with ca.Engine.from_pretrained(
        chat_path,
        store=ca.StoreConfig(dram="24MiB", block_size=16),
        dtype="float32",
        max_model_len=192,
        truncation=truncation,
    ) as engine:
        messages = [system, user("a long question " * 20)]
        request = engine.add_request(messages, sampling(), conversation="a")
        chain = request.chain
        while not request.finished:
            engine.step()
        context = chain.context_tokens(chain.num_tokens).tolist()
    text = engine.tokenizer.decode(context, skip_special_tokens=False)
    assert len(context) < chain.num_tokens  # cuts took place
    assert text.startswith("<|start|>system\n" + system["content"]) == keep_system


def test_stream_gives_the_text_piece_by_piece(engine):
    want = engine.generate("once", sampling(20, ignore_eos=True))
    *deltas, reply = engine.stream("once", sampling(20, ignore_eos=True))
    assert [delta.token_id for delta in deltas] == reply.token_ids == want.token_ids
    assert "".join(delta.text for delta in deltas) == reply.text == want.text


def test_stop_string_and_stop_token_end_the_turn(engine):
    free = engine.generate("once", sampling(20, ignore_eos=True))
    whole = [ch for ch in free.text if ch != "\ufffd"]
    stop = whole[3]
    cut = engine.generate("once", sampling(20, ignore_eos=True, stop=stop))
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    token = free.token_ids[5]
    ended = engine.generate("once", sampling(20, ignore_eos=True, stop_token_ids=[token]))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(token) + 1]


def test_a_seed_repeats_in_any_company(engine):
    params = sampling(10, temperature=1.0, seed=7, ignore_eos=True)
    want = engine.generate("once", params).token_ids
    others = [engine.add_request(random_ids(30, seed=s), sampling(9)) for s in range(3)]
    assert engine.generate("once", params).token_ids == want
    assert engine.generate("once", sampling(10, temperature=1.0, seed=8)).token_ids != want
    assert all(request.finished or request.output_ids for request in others)


def test_an_interrupted_turn_leaves_the_finished_ones(chat_path, tmp_path):
    store = ca.StoreConfig(dram="24MiB", ssd="16MiB", path=str(tmp_path / "kv"), block_size=16)
    ids = random_ids(60)

    def open_it() -> ca.Engine:
        return ca.Engine.from_pretrained(chat_path, store=store, dtype="float32")

    with pytest.raises(KeyboardInterrupt), open_it() as engine:
        done = engine.generate(ids, sampling(ignore_eos=True))
        forward, calls = engine.model.forward, []

        def interrupt(batch):
            calls.append(batch)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return forward(batch)

        engine.model.forward = interrupt
        engine.generate(random_ids(60, seed=1), sampling(ignore_eos=True))
    assert len(calls) == 3
    with open_it() as engine:
        reply = engine.generate(ids + done.token_ids, sampling())
    assert reply.cached_from["ssd"] == reply.num_cached_tokens == 60 + 12 - 1


def test_a_stream_that_is_dropped_is_aborted(engine):
    stream = engine.stream("once", sampling(50, ignore_eos=True))
    next(stream)
    stream.close()
    assert engine.step() == []
    assert engine.store.stats()["tiers"]["dram"]["pinned_slots"] == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([3, 258], r"token id 258 is not in the vocabulary \[0, 258\)"),
        ([-1], "token id -1"),
    ],
)
def test_bad_prompts_are_refused(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompt)
    assert engine.step() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be 'cpu'"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"max_model_len": 513}, r"max_model_len must be in \[1, 512\]"),
        ({"max_step_tokens": 0}, "max_step_tokens must be at least 1"),
    ],
)
def test_bad_options_are_named(chat_path, options, message):
    with pytest.raises(ValueError, match=message):
        ca.Engine.from_pretrained(chat_path, **options)


def test_text_needs_a_tokenizer(tmp_path):
    path = save_model(tmp_path, layers=1)
    with ca.Engine.from_pretrained(path, dtype="float32") as engine:
        for prompt in ("text", [user("hi")]):
            with pytest.raises(ValueError, match="no tokenizer"):
                engine.generate(prompt)
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            engine.generate([1], ca.SamplingParams(stop="x"))


def test_a_template_that_refuses_says_why(chat_path, tmp_path):
    engine_tokenizer = ca.Engine.from_pretrained(chat_path).tokenizer
    refusing = type(engine_tokenizer)(
        engine_tokenizer.backend, "{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(ValueError, match="roles must alternate"):
        refusing.render([user("hi")])
    escaping = type(engine_tokenizer)(
        engine_tokenizer.backend, "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    )
    with pytest.raises(ValueError, match="refuses"):
        escaping.render([user("hi")])
