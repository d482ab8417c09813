"""Tiny tokenizers of the kinds that models have, made in code: what they know of a text differs, not what it is."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_tokenizer


def normalizing() -> PreTrainedTokenizerFast:
    """Byte-level BPE behind NFC, as Qwen has."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama-2's shape: ▁ for a space, one before every text, and bytes for what is not in the vocabulary."""
    words = ["▁the", "▁cat", "▁sat", "▁été"]
    vocabulary = dict.fromkeys(["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"])
    vocabulary |= dict.fromkeys(sorted({letter for word in words for letter in word}))
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary[word[:end]] = None
    ids = {token: number for number, token in enumerate(vocabulary)}
    merges = list(dict.fromkeys(merges))
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's shape: lower case, accents and white space dropped, [UNK] for what is not in the vocabulary."""
    pieces = [
        "[UNK]",
        "[BOS]",
        "the",
        "cat",
        "sat",
        "ete",
        "日",
        *"abcdefghij",
        *(f"##{one}" for one in "abcdefghijst"),
    ]
    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", unk_token="[UNK]")


def letters(alphabet: str, *, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A token for each letter of an alphabet and for each merge, and none for anything else: DNA, proteins."""
    names = ["<pad>", "<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, list(merges)))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def superwords() -> PreTrainedTokenizerFast:
    """BPE without a pre-tokenizer, one of whose tokens goes over a space."""
    return letters("абв г", merges=(("а", " "), ("а ", "б")))


def digits() -> PreTrainedTokenizerFast:
    """Every digit on its own, and no letter at all."""
    tokenizer = letters("0123456789 ")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    return tokenizer


KINDS = {
    "byte-level": tiny_tokenizer,
    "byte-level behind NFC": normalizing,
    "sentencepiece": sentencepiece,
    "wordpiece": wordpiece,
    "dna": lambda: letters("ACGTN"),
    "superwords": superwords,
}
