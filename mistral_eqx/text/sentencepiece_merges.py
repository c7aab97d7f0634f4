"""Converts a sentencepiece vocabulary to the `tokenizers` library, for programs that read only its format."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .sentencepiece_model import CONTROL, NORMAL, UNKNOWN, USER_DEFINED


_SPACE = "\u2581"


def with_merges(pieces: Sequence[tuple[str, float, int]], *, add_prefix: bool) -> Tokenizer:
    """The same vocabulary, with merges in the order of the scores.

    It gives the same ids as sentencepiece, with one exception that the library makes: a text that begins with a
    user-defined token gets no leading space.

    **Arguments:**

    - `pieces`: text, score and type of each token, all 256 bytes among them.
    - `add_prefix`: whether a text gets a leading space.

    **Returns:** a tokenizer without normalisation.
    """
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    merges = [
        (score, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort(key=lambda merge: -merge[0])
    unknown = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    model = models.BPE(
        {text: id for id, (text, _, _) in enumerate(pieces)},
        [(left, right) for _, left, right in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    # Unlike sentencepiece, the library adds no space to a text with a leading space. So the first step replaces spaces
    # by another character.
    escape = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False)
    prefix = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([escape, prefix, escape] if add_prefix else [escape])
    strip = [decoders.Strip(content=" ", left=1)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = [text for text, _, kind in pieces if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    user_defined = [text for text, _, kind in pieces if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    return tokenizer
