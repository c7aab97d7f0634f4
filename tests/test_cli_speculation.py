"""The options `--prompt-lookup` and `--draft`: the same texts."""

import pytest
from fixtures.cli import assert_refused, run, save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    # The cache of compiled programs is a setting of the whole process: other tests are to run without it.
    monkeypatch.setattr("mistral_eqx.cli.loading._keep_compiled_programs", lambda: None)
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_text_is_the_same_with_lookups(tiny):
    plain = run("generate", "Call me", "--model", tiny, "-n", 9, "--ignore-eos")
    found = run("generate", "Call me", "--model", tiny, "-n", 9, "--ignore-eos", "--prompt-lookup")
    assert found.exit_code == 0, found.stderr
    assert found.stdout == plain.stdout
    assert "proposed tokens" in found.stderr
    assert "proposed tokens" not in plain.stderr


@pytest.mark.slow
def test_texts_and_replies_are_the_same_with_a_draft(tiny):
    draft = ("--draft", tiny)
    options = ("--model", tiny, "-n", 9, "--temperature", 0.7, "--num-samples", 2)
    plain, found = (run("generate", "Call me", *options, *more) for more in ((), draft))
    assert found.exit_code == 0, found.stderr
    assert found.stdout == plain.stdout
    plain, found = (run("chat", "--model", tiny, "-n", 5, *more, input="Hello\nAgain\n") for more in ((), draft))
    assert found.exit_code == 0, found.stderr
    assert found.stdout == plain.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt-lookup", "--draft", "{tiny}"], ["--prompt-lookup and --draft"]),
        (["--prompt-lookup", "--num-beams", "2"], ["--num-beams", "--prompt-lookup"]),
        (["--draft", "{tiny}", "--logprobs", "2"], ["--logprobs", "--draft"]),
        (["--prompt-lookup", "--regex", "a+"], ["--regex", "--prompt-lookup"]),
        (["--draft", "absent.gguf"], ["absent.gguf"]),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, options, words):
    options = [option.format(tiny=tiny) for option in options]
    assert_refused(run("generate", "hi", "--model", tiny, *options), *words)
