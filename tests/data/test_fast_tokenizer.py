"""Tokenizers of the house as transformers reads them: the same ids, without a line of ours."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from permlab.data.fast_tokenizer import as_pretrained, byte_tokenizer

# Composed and decomposed accents, a character that stands for a byte, the byte 0, four-byte characters, blanks.
ODD = "a\u0300à Ā\0é漢🙂  \r\n\t\0\0<s></s>the end  "


def byte_pairs(*texts: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["byte", "bpe"])
def pair(request, tmp_path_factory):
    """A tokenizer of ours, and what transformers reads back from its files."""
    ours = byte_tokenizer() if request.param == "byte" else byte_pairs("the end of the text, the end\n" * 3)
    folder = tmp_path_factory.mktemp(request.param)
    as_pretrained(ours, sequence_length=7).save_pretrained(folder)
    return ours, AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_training(pair) -> None:
    ours, theirs = pair
    ids = theirs(ODD)["input_ids"]
    assert ids == ours.encode(ODD).ids
    assert theirs.decode(ids) == ODD
    assert len(theirs) == ours.get_vocab_size()


def test_bytes_are_their_own_ids() -> None:
    assert byte_tokenizer().encode(ODD).ids == list(ODD.encode())
    text = "".join(map(chr, range(0x250)))
    assert byte_tokenizer().encode(text).ids == list(text.encode())


def test_beginning_end_and_padding_are_the_byte_that_no_text_holds(pair) -> None:
    ours, theirs = pair
    zero = ours.encode("\0").ids
    assert [[theirs.bos_token_id], [theirs.eos_token_id], [theirs.pad_token_id]] == [zero] * 3
    assert theirs("the")["input_ids"] == ours.encode("the").ids  # none is added
    assert theirs.model_max_length == 7
    assert theirs(["the", "t"], padding=True).keys() == {"input_ids", "attention_mask"}


def test_a_tokenizer_without_that_byte_to_spare_is_refused() -> None:
    with pytest.raises(ValueError, match="the byte 0, which has to stay free"):
        as_pretrained(byte_pairs("a\0\0b" * 9), sequence_length=7)
