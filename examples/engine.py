"""Many requests in one batch: each enters when a row is free, and gets the tokens that it would get alone."""

import sys
import time

import mistral_eqx as mx


PLACES = ["France", "Japan", "Peru", "Kenya", "Norway", "Nepal", "Chile", "Egypt"]


def main(path: str = "smollm2-135m"):
    model, tokenizer = mx.from_pretrained(path)
    requests = [
        mx.Request(f"The capital of {place} is", max_new_tokens=number + 4) for number, place in enumerate(PLACES)
    ]
    with mx.Engine(model, tokenizer, rows=4) as engine:
        begin = time.perf_counter()
        answers = [engine.submit(request) for request in requests]
        events = [answer.result() for answer in answers]
        seconds = time.perf_counter() - begin
        for request, event in zip(requests, events, strict=True):
            print(f"{request.prompt}{event.text!r}: {event.finish} after {len(event.ids)} tokens")
        print(f"{engine.load.new_tokens} tokens in {seconds:.1f} s, compilation included")

        # Drawn with a seed: the same tokens whatever else the engine does.
        drawn = mx.Request("Once upon a time", max_new_tokens=12, temperature=0.9, top_p=0.95, seed=7)
        one, same = engine.run([drawn, drawn])
        print("Equal draws with one seed:", one.ids == same.ids)

    for request, event in zip(requests, events, strict=True):
        out = mx.generate(model, request.prompt, max_new_tokens=request.max_new_tokens, tokenizer=tokenizer)
        assert event.text == out.texts[0]
    print("All texts are those of mx.generate.")


if __name__ == "__main__":
    main(*sys.argv[1:])
