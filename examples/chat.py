"""Answers turn by turn: differs from stream.py in the chat template, and in a `Conversation` that reads what is new."""

import sys

import mistral_eqx as mx


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)
    conversation = mx.Conversation(model)
    messages = []
    for question in ("Name a city in Italy.", "And one in Spain?"):
        print(">", question)
        messages.append({"role": "user", "content": question})
        ids = mx.encode_chat(tokenizer, messages)
        text, answer = mx.Detokenizer(tokenizer, after=ids), ""
        for token in conversation.reply(ids, max_new_tokens=48):
            piece = text.push(token)
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(*sys.argv[1:])
