"""Tokenizers of the data sets in the form that `transformers.AutoTokenizer` reads, without any code of ours.

None of our texts has a token for its beginning or end. The token of the byte 0, which no text holds, stands in
for both, and for padding: other software asks for one. Ids of texts stay what a model was trained on.
"""

import json
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END = "\0"


@cache
def byte_tokenizer() -> "Tokenizer":
    """The 256 bytes as tokens, each its own id.

    Example:
        >>> byte_tokenizer().encode("né").ids == list("né".encode())
        True
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_chars())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def as_pretrained(tokenizer: "Tokenizer", *, sequence_length: int) -> "PreTrainedTokenizerFast":
    """A byte-level tokenizer as transformers' own, the byte 0 being its beginning, end and padding.

    Args:
        tokenizer: with all 256 bytes in its vocabulary, and no special tokens.
        sequence_length: tokens that a model was trained to read.
    Raises:
        ValueError: if the byte 0 is part of a longer token.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.to_str())
    zero = _byte_chars()[0]
    if any(zero in "".join(merge) for merge in state["model"]["merges"]):
        raise ValueError("the tokenizer was learned from text with the byte 0, which has to stay free for the end")
    # Under its own name in place of a visible character's: so the byte, and no such character, is the token.
    number = state["model"]["vocab"].pop(zero)
    state["model"]["vocab"][END] = number
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"] = [{"id": number, "content": END, "special": True, **flags}]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=sequence_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _byte_chars() -> list[str]:
    """The visible character that stands for each byte in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    # Bytes with a visible character of their own stand for themselves, the others for what follows byte 255.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(char): char for char in alphabet if ord(char) < 256}
    others = iter(alphabet[len(own) :])
    return [own[byte] if byte in own else next(others) for byte in range(256)]
