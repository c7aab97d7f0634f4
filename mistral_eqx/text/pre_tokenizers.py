"""The pre-tokenizers of byte-level vocabularies in GGUF files."""

import dataclasses

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """The settings that a name in `tokenizer.ggml.pre` stands for.

    **Attributes:**

    - `patterns`: regular expressions, applied in order. Each splits the words of the previous one into its matches and
        the text between them.
    - `ignores_merges`: whether a word in the vocabulary becomes one token without merges.
    - `adds_bos`: whether to add the beginning-of-sequence token if the file does not say.
    - `composes`: whether to normalise texts to NFC first.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    composes: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer: the patterns, then bytes as characters."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def normalizers(self) -> list[normalizers.Normalizer]:
        """The normalizers that run before the pre-tokenizer."""
        return [normalizers.NFC()] if self.composes else []


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _llama3(digits: str) -> str:
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3 = PreTokenizer((_llama3(r"\p{N}{1,3}"),), ignores_merges=True, adds_bos=True)

PRE_TOKENIZERS = {
    # llama.cpp's default; its converters write this name for vocabularies that they do not recognise.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": PreTokenizer((_llama3(r"\p{N}"),), composes=True),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "tekken": PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True),
}
