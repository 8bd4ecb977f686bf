"""Answers in characters, which must be what the verifier reads, and in tokens, whatever the tokenizer."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlattn.answers import locate, token_span
from rlattn.tasks import Task
from rlattn.tasks.countdown import Countdown, CountdownOptions
from rlattn.tasks.crossthink_qa import CrossThinkQA
from rlattn.tasks.gsm8k import GSM8K
from rlattn.tasks.zebralogic import ZebraLogic
from rlattn.trainers.warmup import build_tokenizer
from tests.make import make_rollouts

TEXTS = [
    "<think>3 + 4 = 7, and 7 * 2 = 14</think> <answer> (3 + 4) * 2 </answer>",
    "So the area is \\frac{\\pi}{4}, thus \\boxed{\\frac{\\pi}{4}}.",
    "Größe naïve — 数学の答えは 四十二 です。🙂🙃 \\boxed{四十二}🙂",
    "the the answer answer is 12, 1234567 boxed",
]


def byte_level():
    """A byte-level BPE with merges: characters of several bytes are spread over tokens, or merged with others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def metaspace():
    """As sentencepiece: spaces are part of words, and the first one of a decoding is dropped."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


TOKENIZERS = {"bytes": byte_level(), "metaspace": metaspace(), "words": build_tokenizer(TEXTS)}


def by_prefixes(tokenizer, ids, characters):
    """The definition: a character belongs to the token after which it first is there, in decodings of every prefix."""
    whole = [len(tokenizer.decode(ids[:i], skip_special_tokens=True).rstrip("\ufffd")) for i in range(len(ids) + 1)]
    start, end = characters
    first = next(i for i in range(len(ids)) if whole[i + 1] > start)
    last = next(i for i in range(len(ids)) if whole[i + 1] >= end)
    return first, last + 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_hold_the_characters(name):
    tokenizer, rng = TOKENIZERS[name], random.Random(0)
    for trial in range(60):
        text = " ".join(rng.choice(TEXTS) for _ in range(rng.randint(1, 8)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (trial % 2)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        start = rng.randrange(len(text))
        end = rng.randint(start + 1, min(len(text), start + rng.choice([1, 5, 300])))
        if "\ufffd" in text[:end]:
            continue
        first, last = token_span(tokenizer, ids, text, (start, end))
        assert (first, last) == by_prefixes(tokenizer, ids, (start, end))
        if name == "bytes":  # what the tokens decode to holds the characters, cut ones aside
            assert text[start:end].strip("\ufffd")[1:] in tokenizer.decode(ids[first:last])


def test_tokens_that_were_sampled_need_not_be_those_of_an_encoding():
    """Single bytes, where the encoder would merge; an end-of-sequence token in the middle is no character."""
    tokenizer = TOKENIZERS["bytes"]
    text = "x" * 300 + " 数 \\boxed{四十二}🙂"
    single = {tokenizer.convert_ids_to_tokens(i): i for i in range(len(tokenizer))}
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = [single[character] for piece, _ in pieces for character in piece]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    ids.insert(302, tokenizer.eos_token_id)
    start = text.index("四")
    first, last = token_span(tokenizer, ids, text, (start, start + 3))
    begin = len(text[:start].encode()) + 1
    assert (first, last) == (begin + 2, begin + 9)  # the third byte completes the first character


def test_what_cannot_be_placed_is_none():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("the answer is 12")["input_ids"]
    assert token_span(tokenizer, ids, "the answer is 12", (14, 16)) is not None
    for characters in ((14, 14), (-1, 3), (3, 17)):
        assert token_span(tokenizer, ids, "the answer is 12", characters) is None
    assert token_span(tokenizer, ids, "another text", (0, 3)) is None
    assert token_span(tokenizer, [], "", (0, 0)) is None


class Plain(Task):
    pass


def bare(kind):
    """A task without its data: what reads answers needs none."""
    return kind.__new__(kind)


MATH = ["\\boxed{ 1 } then \\boxed{ \\frac12 }.", "a\n#### 1,234", "</think>\nThe answer is $x+1$.", "answer: 7. done",
        "<think>\\boxed{3}</think> no", "<answer> 5 </answer>", "\\boxed 5.", "x" * 100_100 + "\\boxed{9}"]  # fmt: skip
GRID = {"solution": {"House 1": {"Name": "Eve"}}}


@pytest.mark.parametrize(
    ("task", "answer", "texts"),
    [
        (bare(GSM8K), "1", MATH),
        (
            bare(CrossThinkQA),
            {"choice": "A", "choices": ["x", "y"]},
            [
                "\\boxed{ B }",
                "<answer> A</answer>",
                "so the **answer** is (B) \nbye",
                "  thus\n C  ",
                "z" * 5000 + "\nB",
            ],
        ),
        (
            bare(ZebraLogic),
            GRID,
            ['ok "solution": {"House 1": {"Name": "eve"}} end', "<answer> eve </answer>"],
        ),
    ],
    ids=["math", "choice", "grid"],
)
def test_the_span_is_what_the_verifier_extracts(task, answer, texts):
    from rlattn.verifiers import choice, grid, math

    judge = {GSM8K: math.judge, CrossThinkQA: choice.judge, ZebraLogic: grid.judge}[type(task)]
    for text in texts:
        start, end = task.answer_span(text)
        assert text[start:end] == judge(answer, text).extracted


def test_countdown_and_completions_without_an_answer():
    task = Countdown(CountdownOptions(train_size=1, test_size=1), 0)
    text = "<answer>1</answer> no, <answer> 3 + 4 </answer> so 3 + 4"
    start, end = task.answer_span(text)
    assert (start, text[start:end]) == (text.index("3"), "3 + 4")
    for kind in (GSM8K, ZebraLogic, Plain):
        assert bare(kind).answer_span("nothing is said") is None
    assert task.answer_span("nothing is said") is None
    assert bare(GSM8K).answer_span("\\boxed{1} \\boxed{2") is None
    assert bare(CrossThinkQA).answer_span("") is None
    for broken in ('"solution": {"House 1": }', "<answer>  </answer>", '<answer> "solution": {</answer>'):
        assert bare(ZebraLogic).answer_span(broken) is None


def test_rollouts_say_where_answers_lie():
    tokenizer = TOKENIZERS["bytes"]
    texts = ["is \\boxed{12}.", "no idea", "\\boxed{四十二}"]
    encoded = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    rollouts = make_rollouts([4, 2, 0], [len(ids) for ids in encoded])
    rollouts.token_ids[rollouts.response_mask] = torch.tensor([i for ids in encoded for i in ids])
    spans = locate(rollouts.replace(texts=texts), bare(GSM8K), tokenizer).answer_spans
    assert spans.dtype == torch.int64
    assert spans[1].tolist() == [2 + len(encoded[1])] * 2  # none: behind the last token
    for b, answer in ((0, "12"), (2, "四十二")):
        begin = rollouts.cu_seqlens[b]
        own = rollouts.token_ids[begin + spans[b, 0] : begin + spans[b, 1]].tolist()
        assert answer[1:] in tokenizer.decode(own)
        assert len(own) <= len(answer.encode())
