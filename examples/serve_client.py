"""Starts a server, and uses it by OpenAI's own client, with `pip install openai`; the server is not this process.

python examples/serve_client.py                        a server of the default model
python examples/serve_client.py --url http://host:8000 one that runs already, with the key in OPENAI_API_KEY
"""

import contextlib
import os
import subprocess
import sys

import openai


QUESTIONS = ("Name a city in Italy.", "Name a city in Spain.", "Name a city in Japan.", "Name a city in Peru.")


@contextlib.contextmanager
def server(name):
    """The address of a server of a model, which ends with this block."""
    command = [sys.executable, "-m", "mistral_eqx", "serve", "--model", name, "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            # It says where it is when it is ready.
            line = process.stdout.readline()
            if not line:
                sys.exit("The server did not start.")
            yield line.split()[-1]
        finally:
            process.terminate()


def use(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    with client:
        model = next(iter(client.models.list())).id

        # A stream, token by token.
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        options = {"model": model, "temperature": 0, "max_tokens": 32}
        for chunk in client.chat.completions.create(messages=messages, stream=True, **options):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()

        # Two answers to one question, each with its own draws of the same seed.
        found = client.chat.completions.create(messages=messages, **{**options, "temperature": 0.8}, n=2, seed=1)
        for choice in found.choices:
            print(f"{choice.index}: {choice.message.content}")

        # A beginning that the server has read before is not read again.
        again = client.chat.completions.create(messages=messages, **options)
        usage = again.usage
        print(f"{usage.prompt_tokens} tokens of prompt, {usage.prompt_tokens_details.cached_tokens} of them cached")

        # What the server cannot do, it refuses.
        try:
            client.chat.completions.create(messages=messages, model=model, temperature=3)
        except openai.BadRequestError as error:
            print(f"Refused: {error.body['message']}")


def main(name="smollm2-135m", url=None):
    if url is not None:
        use(url)
        return
    with server(name) as started:
        use(started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--url"]:
        main(url=sys.argv[2])
    else:
        main(*sys.argv[1:])
