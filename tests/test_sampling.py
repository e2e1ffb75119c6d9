"""Choosing tokens, and the text that streams out of them."""

import math

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from cachedattn.sampling import Sampler, SamplingParams, filtered_probs
from cachedattn.tokenizer import TextStream, Tokenizer

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", True),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_greedy_takes_the_likeliest():
    assert Sampler(SamplingParams())(LOGITS) == 1


def test_temperature_scales():
    probs = filtered_probs(LOGITS, SamplingParams(temperature=2.0))
    assert torch.allclose(probs, (LOGITS / 2).softmax(0))


def test_top_k_keeps_k():
    probs = filtered_probs(LOGITS, SamplingParams(temperature=1.0, top_k=2))
    assert probs.nonzero().flatten().tolist() == [1, 2]
    assert probs.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, [1]), (0.7, [1, 2]), (0.9, [0, 1, 2])])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probs = filtered_probs(LOGITS, SamplingParams(temperature=1.0, top_p=top_p))
    assert probs.nonzero().flatten().tolist() == kept
    full = LOGITS.softmax(0)
    assert torch.allclose(probs[kept], full[kept] / full[kept].sum())


def test_a_seed_repeats_and_another_differs():
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler(torch.zeros(1000)) for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_frequencies_follow_the_probabilities():
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0))
    counts = torch.bincount(torch.tensor([sampler(LOGITS) for _ in range(4000)]), minlength=5)
    assert (counts / 4000 - LOGITS.softmax(0)).abs().max() < 0.03


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def stream(tokenizer: Tokenizer, text: str | bytes, stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces that come out, one a token and the rest."""
    ids = tokenizer.encode(text)
    out = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(out.push(token))
        if out.stopped:
            break
    pieces.append(out.finish())
    assert "".join(pieces) == out.text
    return pieces


def test_streamed_text_holds_whole_characters(byte_tokenizer):
    text = "naïve 漢字 🙂 end " * 3
    pieces = stream(byte_tokenizer, text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[2] == "" and pieces[3] == "ï"  # two bytes, two tokens


def test_an_unfinished_character_shows_at_the_end(byte_tokenizer):
    out = TextStream(byte_tokenizer)
    for token in byte_tokenizer.encode("ok漢")[:-1]:
        out.push(token)
    assert out.text == "ok"
    assert out.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("one STO two", ("STOP",), "one STO two"),  # only looked like it
        ("one STO", ("STOP",), "one STO"),  # held back, given out at the end
        ("aabaab!", ("aab!",), "aab"),  # begins again inside itself
        ("x END y STOP", ("STOP", "END"), "x "),
        ("STOP", ("STOP",), ""),
    ],
)
def test_stop_strings_across_tokens(byte_tokenizer, text, stop, expected):
    pieces = stream(byte_tokenizer, text, stop)
    assert "".join(pieces) == expected
