"""Reads a typed record from a sentence: differs from generate.py in the sampler's grammar, which allows only JSON of a
schema.

The model has 135M parameters and is shown one sentence with its record. The grammar sees to the form, so that the
answer can always be validated; what stands in it is the model's own.
"""

import json
import sys

import jsonschema

import mistral_eqx as mx


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string", "maxLength": 20},
        "languages": {"type": "array", "items": {"enum": ["English", "French", "Italian", "Polish"]}, "maxItems": 4},
    },
    "required": ["name", "age", "city", "languages"],
    "additionalProperties": False,
}
SHOWN = """Sentence: Maria is 34 years old, lives in Lisbon and speaks Polish and French.
Record: {"name": "Maria", "age": 34, "city": "Lisbon", "languages": ["Polish", "French"]}
"""
SENTENCES = (
    "Giulia, who is 27, moved to Turin and speaks Italian and English.",
    "At 61, Tom still lives in York. He speaks English.",
)


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)
    grammar = mx.Grammar.json_schema(tokenizer, SCHEMA)
    out = mx.generate(
        model,
        [f"{SHOWN}Sentence: {sentence}\nRecord: " for sentence in SENTENCES],
        max_new_tokens=700,
        sampler=mx.Sampler(processors=[mx.Guided(grammar)]),
        eos_id=tokenizer.eos_ids,
        tokenizer=tokenizer,
    )
    for sentence, text in zip(SENTENCES, out.texts, strict=True):
        record = json.loads(text)
        jsonschema.validate(record, SCHEMA)
        print(f"{sentence}\n{record}")


if __name__ == "__main__":
    main(*sys.argv[1:])
