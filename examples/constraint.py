"""Writes only what a regular expression allows: differs from generate.py in the sampler's constraint.

The expression becomes an automaton over bytes, by Brzozowski's derivatives, and that becomes a table: which state each
token of the vocabulary leads to. The decoding loop does no more than look a row of it up.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx


NOTHING, EMPTY = ("any of", frozenset()), ("empty",)
CLASSES = {"d": b"0123456789", "s": b" \t\n", "w": b"0123456789_" + bytes(range(65, 91)) + bytes(range(97, 123))}


def one_of(byte_values):
    return ("byte", frozenset(byte_values)) if byte_values else NOTHING


def either(*terms):
    """Any of several terms, in one form whatever their order: so that there are finitely many states."""
    flat = frozenset(term for one in terms for term in (one[1] if one[0] == "any of" else [one]))
    return next(iter(flat)) if len(flat) == 1 else ("any of", flat)


def then(first, second):
    if NOTHING in (first, second):
        return NOTHING
    return second if first == EMPTY else first if second == EMPTY else ("then", first, second)


def parse(pattern):
    """Understands characters, `.`, `[...]` of ASCII, `\\d`, `\\s`, `\\w`, `( | )`, `*`, `+`, `?` and `{n}`."""
    rest = list(pattern)

    def alternatives():
        term = sequence()
        while rest[:1] == ["|"]:
            rest.pop(0)
            term = either(term, sequence())
        return term

    def sequence():
        term = EMPTY
        while rest and rest[0] not in "|)":
            term = then(term, repeated(atom()))
        return term

    def repeated(term):
        while rest and rest[0] in "*+?{":
            sign = rest.pop(0)
            if sign == "{":
                count = int("".join(iter(lambda: rest.pop(0), "}")))
                once, term = term, EMPTY
                for _ in range(count):
                    term = then(term, once)
            else:
                term = either(term, EMPTY) if sign == "?" else then(term if sign == "+" else EMPTY, ("many", term))
        return term

    def atom():
        character = rest.pop(0)
        if character == "(":
            term = alternatives()
            rest.pop(0)
            return term
        if character == "[":
            return characters()
        if character == ".":
            return one_of(set(range(256)) - {10})
        if character == "\\":
            character = rest.pop(0)
            if character in CLASSES:
                return one_of(CLASSES[character])
        term = EMPTY
        for byte in character.encode():
            term = then(term, one_of([byte]))
        return term

    def characters():
        negated, found = rest[0] == "^", set()
        del rest[:negated]
        while (character := rest.pop(0)) != "]":
            last = character
            if rest[0] == "-" and rest[1] != "]":
                _, last = rest.pop(0), rest.pop(0)
            found |= set(range(ord(character), ord(last) + 1))
        return one_of(set(range(256)) - found if negated else found)

    return alternatives()


def may_end(term):
    if term[0] == "then":
        return may_end(term[1]) and may_end(term[2])
    return any(map(may_end, term[1])) if term[0] == "any of" else term[0] in ("empty", "many")


def derivative(term, byte):
    """What has to follow where this byte came first."""
    match term:
        case ("byte", byte_values):
            return EMPTY if byte in byte_values else NOTHING
        case ("any of", terms):
            return either(*(derivative(one, byte) for one in terms))
        case ("many", one):
            return then(derivative(one, byte), term)
        case ("then", first, second):
            after = then(derivative(first, byte), second)
            return either(after, derivative(second, byte)) if may_end(first) else after
    return NOTHING


def automaton(pattern):
    """The next state for each state and byte, -1 if there is none, and which states may be the last."""
    states = [parse(pattern)]
    table = []
    for state in states:
        after = [derivative(state, byte) for byte in range(256)]
        states += [term for term in dict.fromkeys(after) if term not in states and term != NOTHING]
        table.append([-1 if term == NOTHING else states.index(term) for term in after])
    return np.array(table), np.array([may_end(state) for state in states])


class Pattern(eqx.Module):
    """The state to which each token leads from each state, -1 where it may not come."""

    table: jax.Array

    def allowed(self, state):
        return self.table[state] >= 0

    def advance(self, state, token):
        return jnp.maximum(self.table[state, token], 0)


def constraint(pattern, tokenizer, vocab):
    """Lets a text go on as the pattern says, and end where the pattern may end."""
    by_byte, last = automaton(pattern)
    table = np.full((len(by_byte), vocab), -1)
    for token in range(tokenizer.vocab):
        piece = tokenizer.token_bytes(token, first=False)
        if piece and token not in tokenizer.special_ids:
            state = np.arange(len(by_byte))
            for byte in piece:
                state = np.where(state < 0, -1, by_byte[state, byte])
            table[:, token] = state
    for token in tokenizer.eos_ids:
        table[:, token] = np.where(last, np.arange(len(by_byte)), -1)
    automaton_of_tokens = Pattern(jnp.asarray(table, jnp.int32))
    return mx.Constraint(automaton_of_tokens.allowed, automaton_of_tokens.advance, jnp.zeros((), jnp.int32))


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)
    for prompt, pattern in (
        ("People first walked on the moon on the date (year-month-day)", r" (19|20)\d\d-[01]\d-[0-3]\d"),
        ("Is the sun larger than the moon?", r" (yes|no|perhaps), because [a-z ]+\."),
        ("A list of three even numbers:", r"( \d+,){2} \d\d?"),
    ):
        sampler = mx.Sampler(processors=[constraint(pattern, tokenizer, model.config.vocab)])
        out = mx.generate(
            model,
            [tokenizer.encode(prompt)],
            max_new_tokens=24,
            sampler=sampler,
            eos_id=tokenizer.eos_ids,
            tokenizer=tokenizer,
        )
        print(f"{prompt} {pattern!r}: {out.texts[0]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
