"""The examples and the page on generation, run as they stand on a model that fits in a test."""

import ast
import itertools
import re
import runpy
from pathlib import Path

import pytest
from fixtures.cli import save_tiny_model

import mistral_eqx as mx


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", max_positions=1024)


@pytest.fixture
def run(tiny, capsys):
    """Runs an example and gives what it printed."""

    def run(name, *arguments):
        example = runpy.run_path(str(ROOT / "examples" / name))
        assert example["__doc__"]
        example["main"](str(tiny), *arguments)
        return capsys.readouterr().out

    return run


def continued(path, ids, new):
    """The greedy continuation as text."""
    tokenizer = mx.load_tokenizer(path)
    out = mx.generate(mx.load(path), [ids], max_new_tokens=new, eos_id=tokenizer.eos_ids)
    return tokenizer.decode(out.tokens[0, : out.lengths[0]])


@pytest.mark.slow
def test_generate_and_stream_print_the_same(run, tiny):
    prompt = mx.load_tokenizer(tiny).encode("The capital of France is")
    expected = continued(tiny, prompt, 32)
    assert len(expected) > 5
    assert run("generate.py") == run("stream.py") == expected + "\n"


@pytest.mark.slow
def test_sample_prints_a_line_for_each_seed(run):
    lines = [line.split(": ", 1)[1] for line in run("sample.py").splitlines() if "seed" in line]
    assert len(lines) == 9
    # Two samplers that leave out little may draw the same with one seed.
    for of_one_sampler in (lines[:3], lines[3:6], lines[6:]):
        assert len(set(of_one_sampler)) == 3


@pytest.mark.slow
def test_engine_gives_the_texts_of_generate(run):
    *answers, said, drawn, same = run("engine.py").splitlines()
    assert len(answers) == 8
    assert "tokens in" in said
    assert drawn == "Equal draws with one seed: True"
    assert same == "All texts are those of mx.generate."


@pytest.mark.slow
def test_long_prompt_says_what_generate_says(run, tiny):
    sentence = mx.load_tokenizer(tiny).encode("The quick brown fox jumps over the lazy dog. ")
    prompt = (sentence * 300)[:300]
    out = mx.generate(mx.load(tiny), [prompt], max_new_tokens=16)
    text, time, memory = run("long_prompt.py", "300").splitlines()
    assert ast.literal_eval(text) == mx.load_tokenizer(tiny).decode(out.tokens[0])
    assert time.startswith("300 tokens read and 16 decoded")
    assert re.fullmatch(r"all scores of one layer: [\d,]+ MB; the whole process at most: [\d,]+ MB", memory)


@pytest.mark.slow
def test_constraint_writes_what_the_patterns_allow(run):
    lines = run("constraint.py").splitlines()
    assert len(lines) == 3
    for line in lines:
        pattern, text = re.fullmatch(r".*? ('.*'): ('.*')", line).groups()
        # A random model may not come to the end of `[a-z ]+` or of `\d+` in time.
        text, pattern = ast.literal_eval(text), ast.literal_eval(pattern)
        assert any(re.fullmatch(pattern, text + end) for end in ("", "a.", ".", ", 1, 1", ", 1"))


@pytest.mark.slow
def test_json_schema_reads_records(run):
    lines = run("json_schema.py").splitlines()
    assert len(lines) == 4
    for line in lines[1::2]:
        assert list(ast.literal_eval(line)) == ["name", "age", "city", "languages"]


@pytest.mark.parametrize(
    "pattern",
    [r"a(b|cd)*e?", r"[^a-y]{3}", r"\d+\.\d\d", r"(ab|a)(bc|c)?x", r"a?b?c?", r"x.{2}y", r"(a*b)*", r"é|ab"],
)
def test_the_automaton_of_a_pattern_is_that_of_re(pattern):
    by_byte, last = runpy.run_path(str(ROOT / "examples/constraint.py"))["automaton"](pattern)
    for text in (
        "",
        *map("".join, itertools.chain(*(itertools.product("abcxz1.", repeat=n) for n in range(1, 5)))),
        "é",
    ):
        state = 0
        for byte in text.encode():
            state = by_byte[state, byte] if state >= 0 else -1
        assert (state >= 0 and bool(last[state])) == bool(re.fullmatch(pattern, text))


@pytest.mark.slow
def test_speculative_says_the_same_in_fewer_passes(run):
    lines = run("speculative.py", 48).splitlines()
    assert len(lines) == 6
    for plain, looked_up, same in (lines[:3], lines[3:]):
        assert re.search(r"plain: [\d.]+ tokens/s$", plain)
        accepted, proposed, passes = map(int, re.findall(r"(\d+) (?:of|proposed|passes)", looked_up))
        assert accepted <= proposed
        assert passes <= 47
        assert same.startswith("the same text")


@pytest.mark.slow
def test_the_page_on_speculation(tiny, capsys):
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs/speculative.md").read_text(), flags=re.DOTALL):
        exec(compile(snippet.replace('"smollm2-135m"', repr(str(tiny))), "speculative.md", "exec"), names)
    # The draft has the model's own weights.
    assert names["out"].acceptance.rate > 0.5
    assert "Acceptance(" in capsys.readouterr().out


@pytest.mark.slow
def test_perplexity_tells_what_surprises(run, tiny):
    text = (ROOT / "examples/data/moby-dick.txt").read_text(encoding="utf-8")[:600]
    first, second, *surprises = run("perplexity.py", ROOT / "examples/data/moby-dick.txt", 256, 600).splitlines()
    found = mx.perplexity(mx.load(tiny), mx.load_tokenizer(tiny), text, context=256)
    assert first == (
        f"{found.tokens} tokens: perplexity {found.perplexity:.2f}, {found.bits_per_byte:.3f} bits per byte"
    )
    assert "of the first 63 are" in second
    probabilities = [float(line.split()[1].removesuffix(":")) for line in surprises]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities)
    assert probabilities[-1] < 1 / 260


@pytest.mark.slow
def test_batch_prints_a_line_for_each_text(run):
    printed = run("batch.py")
    assert printed.count("greedy: ") == 3
    assert printed.count("sample: ") == 4
    assert printed.count("?") >= 3


@pytest.mark.slow
def test_chat_remembers(run, tiny):
    printed = run("chat.py")
    tokenizer, messages = mx.load_tokenizer(tiny), []
    expected = ""
    for question in ("Name a city in Italy.", "And one in Spain?"):
        messages.append({"role": "user", "content": question})
        answer = continued(tiny, mx.encode_chat(tokenizer, messages), 48)
        messages.append({"role": "assistant", "content": answer})
        expected += f"> {question}\n{answer}\n"
    assert printed == expected


@pytest.mark.slow
def test_tools_are_called_and_answered(tiny, monkeypatch, capsys):
    """A model that writes the right calls: the random one's would be no JSON."""
    said = iter([' 123, "b": 457}}</tool_call>', "It is 56211.", " 31}}</tool_call>", "I need two numbers."])
    tokenizer, asked = mx.load_tokenizer(tiny), []

    def reply(conversation, ids, **options):
        asked.append(tokenizer.decode(ids, skip_special=False))
        return iter([*tokenizer.encode(next(said), add_bos=False), tokenizer.control_tokens["<|im_end|>"]])

    monkeypatch.setattr(mx.Conversation, "reply", reply)
    example = runpy.run_path(str(ROOT / "examples/tools.py"))
    example["main"](str(tiny))
    assert capsys.readouterr().out == (
        '> What is 123 times 457?\nmultiply({"a": 123, "b": 457}) gives {"result": 56211}\nIt is 56211.\n'
        '> And 31 times 29?\nmultiply({"a": 31}) gives {"error": "There is only multiply(a, b)."}\n'
        "I need two numbers.\n"
    )
    assert '<tools>[{"type": "function", "function": {"name": "multiply"' in asked[0]
    turns = (
        "<|im_start|>user\nAnd 31 times 29?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "multiply", "arguments": {"a": 31}}</tool_call><|im_end|>\n<|im_start|>user\n'
        '<tool_response>{"error": "There is only multiply(a, b)."}</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )
    assert asked[-1].endswith(turns)


@pytest.mark.slow
def test_tools_bear_a_model_that_writes_no_call(run):
    lines = run("tools.py").splitlines()
    assert lines[0] == "> What is 123 times 457?"
    assert lines[1].startswith('<tool_call>{"name": "multiply", "arguments": {"a":')


@pytest.mark.long
def test_tensor_parallel_says_the_same_on_all_meshes(run):
    alone, *others = run("tensor_parallel.py", 2).splitlines()
    assert [line.split()[0] for line in others] == [
        "heads",
        "sequence_parallel",
        "head_dim",
        "kv_replicated",
        "heads_x_kv_seq",
    ]
    text = alone.removeprefix("one device").strip()
    assert len(text) > 5
    assert all(text in line for line in others)


@pytest.mark.long
def test_long_context_has_the_losses_of_one_device(capsys):
    runpy.run_path(str(ROOT / "examples" / "long_context.py"))["main"](1, 2, 32)
    lines = capsys.readouterr().out.splitlines()
    losses = [line.split()[-6] for line in lines if "losses" in line]
    assert len(losses) == 3
    assert set(losses) == {losses[0]}
    assert "18 x collective_permute of 2 kB: keys and values on the ring" in lines[2]


@pytest.mark.long
def test_a_pipeline_has_the_losses_of_one_device(capsys):
    runpy.run_path(str(ROOT / "examples" / "pipeline.py"))["main"](1, 4, 16)
    lines = capsys.readouterr().out.splitlines()
    losses = [line.split()[-6] for line in lines if "losses" in line]
    assert len(losses) == 3
    assert set(losses) == {losses[0]}
    assert "7 ticks, in 3 of which a stage waits: 43%" in lines[3]


@pytest.mark.slow
def test_int8_sums_say_what_they_send_and_what_changes(run):
    lines = run("int8_sums.py", 2, 64).splitlines()
    assert [line.split()[-1] for line in lines[::4]] == ["vocab@tp", "exchange=int8"]
    sent = [float(line.split()[-2]) for line in lines[1::4]]
    # 16 numbers of a token share a scale of 4 bytes.
    assert sent[1] / sent[0] == pytest.approx((1 + 4 / 16) / 4, abs=0.05)
    changes = [float(line.split()[2]) for line in lines[2::4]]
    assert changes[0] == 0 <= changes[1] < 0.1
    assert all(line.startswith("  the text goes on with ") for line in lines[3::4])


@pytest.mark.long
def test_a_disk_step_continues_where_the_process_ended(capsys):
    runpy.run_path(str(ROOT / "examples" / "disk_step.py"))["main"](8, 2, 16)
    out = capsys.readouterr().out
    assert re.findall(r"begins after step (\d+)", out) == ["0", "4"]
    assert re.findall(r"step (\d+): loss", out) == ["2", "4", "6", "8"]
    # Two sets of files for the embedding with the head and for three blocks, and the one that says which counts.
    assert "9 files with" in out


@pytest.mark.long
def test_overlap_has_the_logits_of_one_device(capsys):
    runpy.run_path(str(ROOT / "examples" / "overlap.py"))["main"](1, 8)
    out = capsys.readouterr().out
    assert out.count("logits off by") == 3
    assert out.count("12 x collective_permute of 1 kB: attention input") == 2


def test_own_strategy_splits_both_sides_of_a_weight(run):
    refused, *parts = run("own_strategy.py").splitlines()
    assert refused == (
        "Refused: 2 q_per_kv cannot be split over 4 devices; use HEADS_X_HEAD_DIM or HEADS_X_KV_SEQ, or fewer devices "
        "on that axis."
    )
    assert parts[:3] == [
        "q_proj: (2, 2, 4, 16) in parts of (2, 2, 2, 8)",
        "down_proj: (16, 32) in parts of (8, 16)",
        "embedding: (260, 16) in parts of (130, 8)",
    ]
    assert parts[-1] == "(4, 8, 6) in parts of (2, 8, 3)"


@pytest.mark.long
def test_experts_are_split_in_five_ways(capsys):
    runpy.run_path(str(ROOT / "examples/experts.py"))["main"](4)
    counts, first, *lines = capsys.readouterr().out.splitlines()
    # Two experts for each of 48 tokens.
    assert sum(map(int, re.findall(r"\d+", counts.partition("[")[2]))) == 96
    assert len(re.findall(r"expert \d \d+%", first)) == 2
    held = [re.search(r"(\(\d, \d+, 64\)) of \(8, 128, 64\)", line)[1] for line in lines]
    assert held == ["(1, 128, 64)", "(8, 16, 64)", "(2, 64, 64)", "(2, 128, 64)", "(4, 32, 64)"]


@pytest.mark.long
def test_the_page_on_experts():
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs/experts.md").read_text(), flags=re.DOTALL):
        exec(compile(snippet, "experts.md", "exec"), names)
    assert names["out"].tokens.shape == (1, 16)
    assert names["split"].blocks[0].feed_forward.down_proj.weight.value.addressable_shards[0].data.shape == (2, 64, 64)


@pytest.mark.slow
def test_a_server_is_started_and_used(run):
    printed = run("serve_client.py")
    assert re.search(
        r"\n0: [\s\S]*\n1: [\s\S]*\n\d+ tokens of prompt, \d+ of them cached\nRefused: temperature", printed
    )


@pytest.mark.slow
def test_hosts_continue_prompts_together(run, tiny):
    first, *lines = run("multi_host.py").splitlines()
    assert first == "4 devices of 2 processes"
    tokenizer, prompts = mx.load_tokenizer(tiny), runpy.run_path(str(ROOT / "examples/multi_host.py"))["PROMPTS"]
    assert lines == [f"{prompt}{continued(tiny, tokenizer.encode(prompt), 12)!r}" for prompt in prompts]


@pytest.mark.slow
def test_adapters_are_tuned_saved_and_loaded(run, tmp_path):
    printed = run("finetune_lora.py", tmp_path / "adapters", 10)
    first, *_, last = map(float, re.findall(r"loss ([\d.]+)", printed))
    assert last < first
    assert (tmp_path / "adapters/adapter_model.safetensors").exists()
    assert printed.count("> ") >= 3
    assert printed.endswith("the adapters say the same\n")


@pytest.mark.slow
def test_adapters_are_tuned_beside_quantized_weights(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    printed = run("qlora.py", tmp_path / "adapters", 10, 8, 16)
    first, *_, last = map(float, re.findall(r"loss ([\d.]+)", printed))
    assert last < first
    assert printed.endswith("the adapters say the same\n")


@pytest.mark.slow
def test_schemes_are_compared(run):
    lines = run("quantize.py", 400, 16).splitlines()
    sizes = [float(re.search(r"([\d.]+) MB", line)[1]) for line in lines]
    assert len(lines) == 7
    assert max(sizes[1:]) < sizes[0]


@pytest.mark.slow
def test_calibrated_schemes_are_compared(run):
    lines = run("gptq.py", 1024, 400, 16).splitlines()
    assert [line[:16].strip() for line in lines] == ["float32", "round to nearest", "AWQ", "GPTQ"]
    assert all(re.search(r" s  perplexity +\d+\.\d+$", line) for line in lines)


@pytest.mark.slow
def test_a_gguf_file_is_written_and_run(smollm2_path, tmp_path, capsys):
    runpy.run_path(str(ROOT / "examples/to_gguf.py"))["main"](smollm2_path, tmp_path / "model.gguf")
    assert re.search(r"model.gguf, 144.8 MB: ' Paris", capsys.readouterr().out)


@pytest.mark.slow
def test_the_page_on_tensor_parallelism(tiny):
    page = (ROOT / "docs/parallelism.md").read_text()
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        # The devices are virtual here already.
        snippet = re.sub("jax.config.update.*", "", snippet).replace('"smollm2-135m"', repr(str(tiny)))
        exec(compile(snippet.replace("tp=3", "tp=2"), "parallelism.md", "exec"), names)
    assert names["model"].strategy.exchange == "int8"
    assert names["logits"].shape == (1, 3, 260)
    assert names["out"].tokens.shape == (1, 16)


@pytest.mark.slow
def test_the_page_on_generation(tiny, capsys):
    *snippets, settings = re.findall(r"```python\n(.*?)```", (ROOT / "docs/generation.md").read_text(), flags=re.DOTALL)
    # The last one would be a setting of the whole process: other tests are to run without it.
    assert "jax.config" in settings
    names = {}
    for snippet in snippets:
        exec(compile(snippet.replace('"smollm2-135m"', repr(str(tiny))), "generation.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert len(names["answer"]) > 5


@pytest.mark.long
def test_the_page_on_sampling(tiny, capsys):
    snippets, names = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sampling.md").read_text(), flags=re.DOTALL), {}
    for snippet in snippets:
        exec(compile(snippet.replace('"smollm2-135m"', repr(str(tiny))), "sampling.md", "exec"), names)
    assert names["out"].tokens.shape == (2, 8)
    assert capsys.readouterr().out.startswith("(8, 24)")


@pytest.mark.slow
def test_the_page_on_structured_output(tiny, capsys):
    page = (ROOT / "docs/structured_output.md").read_text()
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(snippet.replace('"smollm2-135m"', repr(str(tiny))), "structured_output.md", "exec"), names)
    record, answer = capsys.readouterr().out.splitlines()
    assert list(ast.literal_eval(record)) == ["city", "country", "population"]
    assert answer in (" yes", " no")


def test_the_page_on_evaluation(tiny, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(snippet.replace('"smollm2-135m"', repr(str(tiny))), "evaluation.md", "exec"), names)
    assert capsys.readouterr().out.count("-") == 3
