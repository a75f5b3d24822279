"""Between a completion's tokens and its text: what a tokenizer adds or takes at a text's beginning is left out.

A completion goes on from its prompt, but SentencePiece-like tokenizers treat every text as the beginning of one: they
put a space before it when they encode, and take one away when they decode. So " 7" and "7" would be one text, and
neither would come back as the tokens that were sampled. Here both directions treat a text as a middle: the steps that
act on a beginning are taken out of a copy of the tokenizer.

    Metaspace (pre-tokenizer, decoder), ByteLevel (pre-tokenizer)    told not to add, nor to strip, a space
    Prepend (normaliser)                                             taken out
    Strip (decoder)                                                  told to leave the start as it is

Where decoding and encoding do not bring the same tokens back (a model may spell a word in smaller tokens than its
tokenizer would, sample a special token, or end inside a character), nothing can be done on the way through text: the
node counts its own such completions as `completions/retokenized`.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what bytes that make no whole character are decoded to


class CompletionText:
    """Encodes and decodes completions with a copy of `tokenizer`.

    Args:
        tokenizer: of the policy.
        ends: tokens that end a turn of the policy: they are special here, though the tokenizer may not say so.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> None:
        self._tokenizer: Any = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._middle: Tokenizer | None = None
        if backend is not None:
            described = _without_beginnings(json.loads(backend.to_str()))
            for token in described["added_tokens"]:
                token["special"] |= token["id"] in ends
            self._middle = Tokenizer.from_str(json.dumps(described))
            self._middle.no_padding()
            self._middle.no_truncation()
            self._middle.encode_special_tokens = True
        added = {token for token, added_token in tokenizer.added_tokens_decoder.items() if added_token.special}
        self._special = ({*tokenizer.all_special_ids, *ends} | added) - {tokenizer.unk_token_id}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`.

        A special token that is spelt out in it is encoded letter by letter, or left out by a tokenizer that has no
        other piece for it, as unigram models do: a peer's text must not be able to end, or begin, a turn.
        """
        if self._middle is not None:
            ids: list[int] = self._middle.encode(text, add_special_tokens=False).ids
        else:
            ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return ids if self._special.isdisjoint(ids) else [token for token in ids if token not in self._special]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        if self._middle is not None:
            return str(self._middle.decode(list(ids), skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _without_beginnings(node: Any) -> Any:
    """Return a tokenizer's description, or a part of one, without the steps that act on a text's beginning."""
    if isinstance(node, list):
        return [_without_beginnings(child) for child in node if not _prepends(child)]
    if not isinstance(node, dict):
        return node
    changed = {
        key: None if _prepends(child) else child if key in ("model", "added_tokens") else _without_beginnings(child)
        for key, child in node.items()
    }
    match node.get("type"):
        case "Metaspace":
            changed["prepend_scheme"] = "never"
        case "ByteLevel" if "add_prefix_space" in node:
            changed["add_prefix_space"] = False
        case "Strip" if "start" in node:
            changed["start"] = 0
    return changed


def _prepends(node: Any) -> bool:
    return isinstance(node, dict) and node.get("type") == "Prepend"
