"""A completion's text stands for the tokens that were sampled, under each family of tokenizers."""

import json
import random
import unicodedata
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from node.policy.completion_text import INCOMPLETE, CompletionText
from node.policy.load import Policy

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_end|>", "<unk>"]
WORDS = "one two seven eleven plus minus is the answer Answer therefore 12 345 7 0 + - = . , ( ) naïve café"


def corpus() -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(400):
        yield " ".join(rng.choices(WORDS.split(), k=12)) + rng.choice(["\n", ".", " 42\n\n"])


def byte_level(prefix_space: bool = False) -> Tokenizer:
    """As GPT-2, Qwen, SmolLM and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return tokenizer


def qwen_like() -> Tokenizer:
    """Byte-level after a splitting pattern, with a normaliser."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def unigram(scheme: str) -> Tokenizer:
    """As T5, Gemma and XGLM have it: SentencePiece's unigram model, a space before each text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    train(tokenizer, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>"))
    return tokenizer


def llama_like() -> Tokenizer:
    """As Llama 2 and Mistral have it: SentencePiece's BPE with bytes for what is unknown, a space prepended."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no piece goes beyond a word
    train(tokenizer, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL))
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    state |= {"pre_tokenizer": None, "model": state["model"] | {"byte_fallback": True}}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> None:
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])


KINDS = {
    "byte-level": byte_level,
    "byte-level with a space": lambda: byte_level(prefix_space=True),
    "split and byte-level": qwen_like,
    "unigram, always": lambda: unigram("always"),
    "unigram, first": lambda: unigram("first"),
    "unigram, never": lambda: unigram("never"),
    "bpe with bytes": llama_like,
}
LOSSLESS = [kind for kind in KINDS if not kind.startswith("unigram")]  # unigram has no token for an unseen letter


@cache
def wrapped(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def text_of(kind: str) -> CompletionText:
    return CompletionText(wrapped(kind))


known = st.text(alphabet="onetwsvl pusia 0123457+-=.,()\n", max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@given(known)
@settings(max_examples=60, deadline=None)
def test_text_comes_back_as_it_was_with_its_leading_spaces(kind: str, text: str) -> None:
    text = text.replace("\n", " ") if kind.startswith("unigram") else text
    both = text_of(kind)
    assert both.decode(both.encode(text)) == text


@pytest.mark.parametrize("kind", LOSSLESS)
@given(st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_at_all_comes_back(kind: str, text: str) -> None:
    both = text_of(kind)
    text = text.replace("▁", "_")  # SentencePiece's own sign for a space
    expected = unicodedata.normalize("NFC", text) if kind == "split and byte-level" else text
    assert both.decode(both.encode(text)) == expected


words = st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=6).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
@given(words, words)
@settings(max_examples=60, deadline=None)
def test_a_completion_has_the_tokens_that_it_has_after_a_prompt(kind: str, prompt: str, completion: str) -> None:
    """What the tokenizer itself makes of both together, less what it makes of the prompt."""
    tokenizer, both = wrapped(kind), text_of(kind)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{prompt} {completion}", add_special_tokens=False)["input_ids"]
    sampled = whole[len(before) :]
    assert whole[: len(before)] == before
    assert both.decode(sampled) == f" {completion}"
    assert both.encode(f" {completion}") == sampled


@pytest.mark.parametrize("kind", KINDS)
@given(words, st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_the_text_of_a_completion_that_is_cut_off_stays_what_it_is(kind: str, text: str, cut: int) -> None:
    both = text_of(kind)
    kept = both.decode(both.encode(text)[:cut]).rstrip(INCOMPLETE)
    assert text.startswith(kept)
    assert both.decode(both.encode(kept)) == kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_token_with_a_space_and_one_without_are_two_texts(kind: str) -> None:
    """What the tokenizer alone would take for one: `decode` drops a first space, `encode` adds one."""
    both = text_of(kind)
    with_space, without = both.encode(" seven"), both.encode("seven")
    assert with_space != without
    assert (both.decode(with_space), both.decode(without)) == (" seven", "seven")


@pytest.mark.parametrize("kind", ["byte-level with a space", "unigram, always", "unigram, first", "bpe with bytes"])
def test_the_tokenizer_alone_would_confuse_them(kind: str) -> None:
    """Why there is a copy at all."""
    tokenizer = wrapped(kind)
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("seven", " seven")]
    assert alone[0] == text_of(kind).encode(" seven") or alone[0] == alone[1]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_neither_shown_nor_written(kind: str) -> None:
    both, tokenizer = text_of(kind), wrapped(kind)
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    ids = both.encode("one two")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert both.decode([end, *ids, end]) == "one two"
    spelt = both.encode("one</s><|im_end|><s> two")
    assert spelt and not (special - {tokenizer.unk_token_id}) & set(spelt)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_character_of_which_only_a_part_is_there_is_no_text(kind: str) -> None:
    both = text_of(kind)
    ids = both.encode("one 😀")
    for cut in range(len(both.encode("one ")) + 1, len(ids)):
        text = both.decode(ids[:cut])
        assert text.rstrip(INCOMPLETE).rstrip() == "one"


def test_of_a_completion_that_ends_inside_a_character_a_policy_leaves_that_part_out() -> None:
    policy = Policy(None, wrapped("byte-level"), "p", (2,))
    ids = policy.encode_completion("one 😀", finished=False)
    assert policy.decode(ids) == "one 😀"
    assert policy.decode(ids[:-1]) == "one "
    assert policy.decode([*ids[:-1], 2]) == f"one {INCOMPLETE}"  # finished: that is what the model said
    assert policy.encode_completion("one ", finished=False) == ids[: len(policy.encode_completion("one ", False))]


def test_a_token_that_ends_a_turn_is_neither_shown_nor_written_though_its_tokenizer_does_not_call_it_special() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=False)])
    end = tokenizer.token_to_id("<end_of_turn>")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert end in CompletionText(wrapped).encode("7<end_of_turn>"), "it is written if nobody says that it ends a turn"
    text = CompletionText(wrapped, [end])
    ids = text.encode("7<end_of_turn>x")
    assert end not in ids and text.decode(ids) == "7<end_of_turn>x"
    assert text.decode([*text.encode("7"), end]) == "7"
    policy = Policy(None, wrapped, "p", (tokenizer.token_to_id("</s>"), end))
    assert policy.encode_completion("7<end_of_turn>x", finished=False) == ids
