import json

import pytest
from cli_fixtures import assert_refused, run, save_tiny_model

from mistral_eqx.plan import Memory, Phase, Report, planning


SMALL = ("--batch", 2, "--prompt", 16, "--kv-seq", 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


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
    result = run("plan", tiny, "--devices", 4, *SMALL, "--strategy", "all", "--mesh", "kv=2,rep=2")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    planned = [row[0] for row in rows if row[1:3] == ["(kv=2,rep=2)", "decode"]]
    assert planned == 2 * ["kv_replicated", "heads_x_head_dim", "heads_x_kv_seq"]
    assert "bfloat16) on 4 virtual devices, batch 2, prompt 16, kv_seq 64" in result.stdout
    assert [job.axes for job in jobs] == 3 * [{"kv": 2, "rep": 2}]
    refused = [line.split(" is not planned: ")[0] for line in result.stderr.splitlines()]
    assert refused == ["heads", "sequence_parallel", "head_dim"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["topology such as 'v4:2x2x4'"]),
        (("--devices", 16, "--strategy", "heads"), ["8 kv_heads cannot be split over 16 devices"]),
        (("--topology", "v4-32"), ["'v4-32'"]),
        (("--topology", "v9:2x2"), ["v5p"]),
        (("--devices", 8, "--strategy", "tensor"), ["'tensor'"]),
        (("--devices", 8, "--dtype", "int8"), ["int8"]),
    ],
)
def test_a_plan_that_cannot_be_made_ends_with_one_sentence(options, words):
    assert_refused(run("plan", "7b-v0.2", *options), *words)
