import io
import json

import pytest
from fixtures.cli import assert_refused, run, save_tiny_model
from rich.console import Console

import mistral_eqx as mx
from mistral_eqx.planning import Memory, Phase, Report, Training, planning


SMALL = ("--batch", 2, "--prompt", 16, "--kv-seq", 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.slow
def test_json_has_the_reports_and_stderr_what_is_not_planned(tiny):
    strategies = ("--strategy", "heads", "--strategy", "head_dim", "--strategy", "kv_replicated")
    result = run("plan", tiny, "--devices", 2, *SMALL, *strategies, "--mesh", "tp=2", "--json")
    assert result.exit_code == 0, result.stderr
    first, second = (Report.from_dict(fields) for fields in json.loads(result.stdout))
    assert (first.strategy, second.strategy) == ("heads", "head_dim")
    assert first.model == str(tiny)
    assert (first.batch, first.prompt, first.kv_seq, first.dtype) == (2, 16, 64, "bfloat16")
    assert [one.count for one in first["decode"].written] == [2 * 2 + 3]
    assert [one.count for one in second["decode"].written] == [3 * 2 + 3]
    (line,) = result.stderr.splitlines()
    assert line.startswith("kv_replicated is not planned: ")
    assert "'kv'" in line


def test_all_takes_what_is_legal(tiny, monkeypatch):
    jobs = []

    def compiled(job):
        jobs.append(job)
        memory = Memory(10**6, 2 * 10**6, 0, 0, 0)
        return [Phase("decode", 1, 1, memory, 0.0, 0, 0, (), (), 1.0, None, None)]

    monkeypatch.setattr(planning, "_compiled", compiled)
    # 2 key/value heads, 2 queries each, and 4 entries, of which no pair can be torn apart.
    options = ("--strategy", "all", "--mesh", "kv=2,rep=2", "--cache-dtype", "int8")
    result = run("plan", tiny, "--devices", 4, *SMALL, *options)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    planned = [row[0] for row in rows if row[1:3] == ["(kv=2,rep=2)", "decode"]]
    assert planned == 2 * ["kv_replicated", "heads_x_head_dim", "heads_x_kv_seq"]
    assert "bfloat16, cache int8) on 4 virtual devices, batch 2, prompt 16, kv_seq 64" in result.stdout
    assert [(job.axes, job.cache_dtype) for job in jobs] == 3 * [({"kv": 2, "rep": 2}, "int8")]
    refused = [line.split(" is not planned: ")[0] for line in result.stderr.splitlines()]
    assert refused == ["heads", "sequence_parallel", "head_dim", "experts"]


def test_each_scheme_is_planned(tiny, monkeypatch):
    jobs = []

    def compiled(job):
        jobs.append(job)
        return [Phase("decode", 1, 1, Memory(10**6), 0.0, 0, 0, (), (), 1.0, None, None)]

    monkeypatch.setattr(planning, "_compiled", compiled)
    schemes = ("--quantize", "none", "--quantize", "int8", "--quantize", "fp8", "--quantize", "F16")
    result = run("plan", tiny, "--devices", 2, *SMALL, *schemes, "--json")
    assert result.exit_code == 0, result.stderr
    assert [job.quantize for job in jobs] == [None, mx.Int8(), mx.FP8(), mx.GGUF("F16")]
    found = [list(report["formats"]) for report in json.loads(result.stdout)]
    assert [set(names) - {"bfloat16"} for names in found] == [set(), {"INT8"}, {"FP8"}, {"F16"}]


def test_the_smallest_numbers_of_chips_are_printed():
    options = ("--chip", "v5e", "--quantize", "none", "--quantize", "nf4", "--batch", 1, "--kv-seq", 512)
    result = run("plan", "gpt-small", *options)
    assert result.exit_code == 0, result.stderr
    *_, plain, small = (line.split() for line in result.stdout.splitlines())
    assert plain[:3] == ["gpt-small", "bfloat16", "0.2"]
    assert small[:3] == ["gpt-small", "NF4/64,", "bfloat16"]
    assert plain[3:7] == small[4:8] == ["1", "v5e", "single", "(tp=1)"]
    first, second = json.loads(run("plan", "gpt-small", *options, "--json").stdout)
    assert first["weights"] == first["all_weights"] == 2 * mx.PRESETS["gpt-small"].parameters
    assert list(second["formats"]) == ["NF4/64", "bfloat16"]
    assert second["total"] == sum(second["formats"].values()) + second["cache"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["topology such as 'v4:2x2x4'"]),
        (("--devices", 16, "--strategy", "heads"), ["8 kv_heads cannot be split over 16 devices"]),
        (("--topology", "v4-32"), ["'v4-32'"]),
        (("--topology", "v9:2x2"), ["v5p"]),
        (("--devices", 8, "--strategy", "tensor"), ["'tensor'"]),
        (("--devices", 8, "--dtype", "int8"), ["int8"]),
        (("--devices", 10**7), ["--devices is 10000000", "at most 4096"]),
        (("--topology", "v4:0x0x0"), ["'v4:0x0x0' has 0 chips"]),
        (("--topology", "v4:99999x99999x99999"), ["'v4:99999x99999x99999'", "16384 at most"]),
        (("--devices", 1, "--train", "--zero", 9), ["--zero is [9]", "one of 0, 1, 2, 3"]),
        (
            ("--devices", 1, "--train", "--prompt", 3),
            ["--prompt, --kv-seq and --cache-dtype are of generation", "--seq"],
        ),
        (("--devices", 1, "--quantize", "int5"), ["--quantize is 'int5'", "none, nf4, int4, int8, fp8", "Q4_K_M"]),
        (("--devices", 1, "--train", "--quantize", "int8"), ["float weights", "leave out --quantize"]),
        (("--chip", "v9"), ["'v9'", "v5p"]),
        (("--chip", "v5e", "--topology", "v5e:2x2"), ["--chip", "leave out --topology"]),
        (("--chip", "v5e", "--train"), ["--chip", "leave out --train"]),
        (("--devices", 1, "--picture", "x.zzz"), ["'x.zzz' must end in one of", ".png"]),
        (("--devices", 1, "--picture", "absent/x.png"), ["'absent/x.png'", "folder that is not there"]),
    ],
)
def test_a_plan_that_cannot_be_made_ends_with_one_sentence(options, words):
    assert_refused(run("plan", "7b-v0.2", *options), *words)


def test_names_with_brackets_are_shown_as_they_are():
    memory = Memory(10**6, 2 * 10**6, 0, 0, 0)
    phase = Phase("decode", 1, 1, memory, 0.0, 0, 0, (), (), 1.0, None, None)
    fields = {"parameters": 1, "place": "[/nope]", "devices": 1, "chip": None, "layout": "", "axes": {"tp": 1}}
    fields |= {"batch": 1, "prompt": 1, "kv_seq": 1, "dtype": "float32", "phases": (phase,), "training": None}
    out = io.StringIO()
    Console(file=out, width=160).print(Report(model="[bold]m", strategy="[/x] :smile:", **fields).table())
    for name in ("[bold]m", "[/nope]", "[/x] :smile:"):
        assert name in out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"devices": 0}, "devices is 0; it must be at least 1"),
        ({"devices": 10**400}, "devices is 1000"),
        ({"devices": 1, "batch": 0}, "batch is 0"),
        ({"devices": 1, "prompt": 10**12}, "prompt is 1000000000000"),
        ({"devices": 1, "kv_seq": -1}, "kv_seq is -1"),
        ({"devices": 1, "dtype": "int8"}, "dtype is 'int8'; it must be one of 'float32', 'bfloat16', 'float16'"),
        ({"topology": "v4:" + "9" * 5000}, "must be a chip"),
    ],
)
def test_wrong_arguments_of_the_library_are_named(arguments, said):
    with pytest.raises(mx.InputError, match=said):
        mx.plan("gpt-nano", **{"strategy": "single", **arguments})


@pytest.mark.parametrize("fields", [{"seq": 0}, {"accumulate": 2**31}, {"remat": "all"}])
def test_training_holds_its_fields_to_their_ranges(fields):
    with pytest.raises(mx.InputError, match=str(next(iter(fields)) if "remat" not in fields else "rematerialisation")):
        Training(**fields)
