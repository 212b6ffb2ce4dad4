"""Each check's verdict on models and recipes that are right, odd or wrong; the table; the exit status."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig

from skd_plugin import cli
from skd_plugin.check import dry_run, environment
from skd_plugin.check.engine_parts import check_parts
from skd_plugin.check.findings import Finding, exit_status, findings_table, verdict
from skd_plugin.check.model_pair import (
    check_end_tokens,
    check_first_prompt,
    check_padding,
    check_template,
    check_vocabulary,
    load_model,
    try_to_load,
)
from skd_plugin.check.rollout_words import check_rule
from skd_plugin.check.self_test import judge, judge_pair, make_pair, make_trial
from skd_plugin.check.self_test_process import Measured, measure
from skd_plugin.check.subject import read_subject
from skd_plugin.config import versions
from skd_plugin.config.host_options import host_parser
from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.config.schema import SKDConfig
from skd_plugin.core.gates import CONFIDENT, GATES
from skd_plugin.core.methods import METHODS
from skd_plugin.core.trace import NOTHING, Source, Trace
from skd_plugin.models import load_tokenizer
from skd_plugin.run_folder import RunFolder, Status
from tests.teacher_server import NAME, TeacherServer, serving

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SMALL = ["skd.task.train_prompts=64", "skd.task.eval_prompts=4"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}={% endfor %}"


@pytest.fixture(autouse=True)
def on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def pair(tiny_pair: Path, tmp_path: Path):
    """`pair(role, name, content)`: the tiny pair with a file of one model changed; returns both as loaded."""
    folder = shutil.copytree(tiny_pair, tmp_path / "pair")

    def change(role: str | None = None, name: str = "", **content):
        if role is not None:
            path = folder / role / name
            path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
        return load_model(str(folder / "teacher"), "teacher"), load_model(str(folder / "student"), "student")

    return change


def options(**changes):
    return vars(host_parser().parse_args([])) | changes


# --- findings and their table ---


def test_exit_status():
    fine, odd, bad = Finding("a", "b"), Finding("a", "b", "warning"), Finding("a", "b", "failed")
    assert exit_status([fine, odd]) == 0
    assert exit_status([fine, bad, fine]) == 1
    assert exit_status([bad, Finding("recipe", "b", "failed")]) == 2
    assert exit_status([bad, Finding("recipe", "b", "not run")]) == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_loses_nothing(width):
    findings = [
        Finding("chat template", "the student's is applied " * 5 + "END", "warning", "look at it " * 9 + "THERE"),
        Finding("a name that is longer than its column", "x" * 150, "failed", "do this"),
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(findings_table(findings, "title"), verdict(findings))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert text.count("x") == 150 and "END" in text and "THERE" in text and "-> look" in text
    assert "1 check failed" in text


def test_markup_in_what_was_found_is_only_text():
    console = Console(width=140, record=True, file=io.StringIO())
    hostile = "[b]x[/b] [/INST]"
    console.print(findings_table([Finding(hostile, hostile, "warning", hostile)], f"skd check {hostile}"))
    shown = console.export_text()
    assert shown.count(hostile) == 4 and f"-> {hostile}" in shown


@pytest.mark.parametrize(
    ("level", "words"), [("ok", "All good"), ("warning", "1 warning"), ("failed", "1 check failed")]
)
def test_the_last_line(level, words):
    assert words in verdict([Finding("a", "b"), Finding("c", "d", level)]).plain


# --- versions and devices ---


def test_every_wrong_version_has_a_line(monkeypatch):
    assert [f.level for f in environment.check_versions()] == ["ok"]
    real = versions.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise PackageNotFoundError(name)
        return "2.40.0" if name == "ray" else real(name)

    monkeypatch.setattr(versions, "version", version)
    findings = {f.name: f for f in environment.check_versions()}
    assert findings["versions"].level == "ok" and "ray" not in findings["versions"].found
    assert findings["ray"].level == "failed" and findings["ray"].found == "2.40.0"
    assert "ray==2.55.*" in findings["ray"].remedy
    assert findings["deepspeed"].found == "not installed"


def test_devices_on_a_cpu():
    one = {"actor.num_gpus_per_node": 1, "vllm.num_engines": 1, "algo.kl.init_coef": 0}
    one |= {"algo.advantage.estimator": "reinforce"}
    fine = environment.check_device(True, options(**one))
    assert fine.level == "ok" and "needs 2: 1 to train, 1 to sample" in fine.found
    many = environment.check_device(True, options(**one | {"vllm.num_engines": 8}))
    assert many.level == "failed" and "wait for ever" in many.remedy
    shared = one | {"vllm.num_engines": 8, "actor.num_gpus_per_node": 8, "train.colocate_all": True}
    assert environment.check_device(True, options(**shared)).level == "ok"


def test_gpus_of_the_hosts_other_models():
    rewards = {
        "algo.kl.init_coef": 0.1,
        "algo.advantage.estimator": "gae",
        "reward.model_name_or_path": "r",
        "ref.num_gpus_per_node": 2,
        "critic.num_gpus_per_node": 3,
        "reward.num_gpus_per_node": 3,
        "vllm.num_engines": 4,
        "vllm.tensor_parallel_size": 2,
    }
    assert environment.gpus_needed(options(**rewards)) == (8, 8, 8)
    together = {"train.colocate_actor_ref": True, "train.colocate_critic_reward": True}
    assert environment.gpus_needed(options(**rewards, **together)) == (8, 8, 3)


def test_a_recipe_for_gpus_on_a_machine_without(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert environment.check_device(False, None).level == "failed"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert environment.check_device(False, None).level == "warning"


# --- the models ---


def test_a_pair_that_is_right(pair):
    teacher, student = pair()
    assert check_vocabulary(teacher, student, refused=False).level == "ok"
    assert [f.level for f in check_end_tokens(teacher, student)] == ["ok"]
    assert check_padding(student) == Finding("padding", "'<pad>'")


def test_different_tokens(pair):
    teacher, student = pair()
    student.tokenizer.add_tokens(["new"])
    found = check_vocabulary(teacher, student, refused=True)
    assert found.level == "failed" and "1 tokens differ" in found.remedy


def test_rows_of_padding(pair):
    teacher, student = pair("student", "config.json", vocab_size=40)
    refused = check_vocabulary(teacher, student, refused=True)
    assert refused.level == "failed" and "teacher 32, student 40" in refused.found and "pad" in refused.remedy
    assert check_vocabulary(teacher, student, refused=False).level == "ok"


def test_a_model_that_is_not_there(tmp_path):
    assert try_to_load(None, "student") == (None, [])
    teacher, findings = try_to_load(str(tmp_path / "none"), "teacher")
    assert teacher is None and [(f.name, f.level) for f in findings] == [("teacher", "failed")]


@pytest.mark.parametrize(
    ("teachers", "students", "applied", "prompt", "level", "words"),
    [
        (TEMPLATE, TEMPLATE, True, "abc", "ok", "the same"),
        (TEMPLATE, None, True, "abc", "failed", "no chat template"),
        (None, TEMPLATE, True, "abc", "warning", "the teacher has none"),
        (TEMPLATE + "x", TEMPLATE, True, "abc", "warning", "has another one"),
        (TEMPLATE, TEMPLATE, False, "abc", "warning", "no special token"),
        (TEMPLATE, TEMPLATE, False, "<s>abc", "ok", "as they are"),
        (None, None, False, "abc", "ok", "as they are"),
    ],
)
def test_chat_template(pair, teachers, students, applied, prompt, level, words):
    teacher, student = pair()
    teacher.tokenizer.chat_template, student.tokenizer.chat_template = teachers, students
    found = check_template(teacher, student, options(**{"data.apply_chat_template": applied}), [prompt])
    assert found.level == level and words in found.found


def test_input_template_is_no_chat_template(pair):
    teacher, student = pair()
    student.tokenizer.chat_template = TEMPLATE
    found = check_template(teacher, student, options(**{"data.input_template": "{}="}), ["abc="])
    assert found.level == "ok" and "input_template" in found.found


def test_first_prompt_shows_its_end(pair):
    tokenizer = pair()[1].tokenizer
    found = check_first_prompt("a" * 500 + "\nlast", tokenizer)
    assert len(found.found) < 200 and found.found.endswith("\\nlast'") and " ... " in found.found


def test_a_missing_bos(pair):
    tokenizer = pair()[1].tokenizer
    assert check_first_prompt("abc", tokenizer).level == "ok", "this tokenizer puts none"
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("abc").input_ids[0] == 1
    found = check_first_prompt("abc", tokenizer)
    assert found.level == "warning" and "<s>" in found.remedy


def set_end(folder: Path, role: str, end) -> None:
    GenerationConfig(eos_token_id=end).save_pretrained(folder / role)


@pytest.mark.parametrize(
    ("teachers", "students", "words"),
    [
        ([2, 7], [2, 7], []),
        ([2, 7], [2], ["the finished student will not stop"]),
        ([2], [2, 7], ["the engine does not stop at the student's"]),
        ([7], [7], ["the teacher's generation_config.json", "the student's generation_config.json"]),
    ],
)
def test_end_tokens(pair, tmp_path, teachers, students, words):
    set_end(tmp_path / "pair", "teacher", teachers)
    set_end(tmp_path / "pair", "student", students)
    findings = check_end_tokens(*pair())
    assert [f.level for f in findings] == (["warning"] * len(words) or ["ok"])
    for finding, text in zip(findings, words, strict=False):
        assert text in finding.remedy


def test_end_tokens_that_are_joined(pair, tmp_path):
    set_end(tmp_path / "pair", "teacher", [2, 7])
    (found,) = check_end_tokens(*pair(), joined=(2, 7))
    assert found.level == "ok" and "</s> (2) and e (7) end a turn" in found.found and "skd.end_tokens" in found.found


def test_no_end_token_at_all(pair):
    teacher, student = (replace(model, end_ids=frozenset()) for model in pair())
    teacher.tokenizer.eos_token = student.tokenizer.eos_token = None
    (found,) = check_end_tokens(teacher, student)
    assert found.level == "warning" and "cut at its longest length" in found.remedy


def test_padding_matters_only_outside_the_vocabulary(pair):
    student = pair()[1]
    student.tokenizer.pad_token = "</s>"
    assert check_padding(student).level == "ok" and "harmless" in check_padding(student).found
    student.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    found = check_padding(student)
    assert found.level == "failed" and "id 32, but the model has 32 rows" in found.found
    student.tokenizer.pad_token = None
    assert check_padding(student).level == "ok"


# --- how responses are sampled, and by which parts ---


def rule(**rollout) -> str:
    return check_rule(SKDConfig(teacher={"model_name_or_path": "t"}, rollout=rollout)).found


def test_sampling_in_words():
    assert "proposes 1 token a block; one stays if it is among the teacher's 7" in rule(top_k=7, draft_len=1)
    assert "nucleus of mass 0.9" in rule(gate="top_p", threshold=0.9)
    assert "every one stays" in rule(method="on_policy") and "every token is the teacher's" in rule(method="teacher")
    assert "every response is the dataset's reference" in rule(method="supervised")
    assert "0.25 of training" in rule(method="two_stage", stage_share=0.25)
    assert "answered by references: the student proposes" in rule(method="mixed_skd")
    assert "most probable, or else is drawn again" in rule(gate="ask_again")
    assert "sure of it (q of 0.9 or more)" in rule(gate="confident", threshold=0.9)
    assert "0.5 nats or less" in rule(gate="confident", threshold=0.5, confidence="entropy")
    assert "teacher's 25 to 3 most" in rule(top_k={"kind": "linear", "from": 25, "to": 3})
    assert "at first, then what keeps 90%" in rule(
        gate="floor", threshold={"kind": "target_acceptance", "rate": 0.9, "start": 0.1}
    )
    assert "student T 0.5 top-p 1, teacher T 1 top-p 0.25" in rule(student_temperature=0.5, teacher_top_p=0.25)


def test_parts_that_are_not_ours():
    parts = {"sampler": "SKDSampler", "drafter": "SKDDrafter", "draft_len": 5}
    assert check_parts(parts, "SKDScheduler").level == "ok"
    found = check_parts(parts | {"sampler": "RejectionSampler"}, "SKDScheduler")
    assert found.level == "failed" and "RejectionSampler" in found.found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", GATES)
def test_every_method_and_gate_has_its_words(method, gate):
    """A sentence with every number filled in; a gate's own words are in it where the method has a gate."""
    known = GATES[gate]
    rollout = RolloutConfig(
        method=method,
        gate=CONFIDENT if known.confidence else "top_k" if known.released else gate,
        confidence=known.confidence or "probability",
        threshold=None if known.threshold is None else 0.125,
        top_k=7,
        reference_compat=known.released and METHODS[method].has_gate,
    )
    words = check_rule(SKDConfig(teacher={"model_name_or_path": "t"}, rollout=rollout)).found
    assert "{" not in words
    assert (known.words.format(top_k=7, threshold=0.125) in words) == METHODS[method].has_gate


# --- the self-test's verdict ---

GOOD = Measured(
    tokens=100,
    proposed=100,
    accepted=100,
    needless=0,
    widest_rejection=0.0,
    mean_loss=1e-6,
    max_loss=1e-5,
    max_teacher_gap=1e-4,
    mean_teacher_gap=1e-5,
    max_draft_gap=1e-4,
    mean_draft_gap=1e-5,
)


@pytest.mark.parametrize(
    ("changes", "dtype", "levels"),
    [
        ({}, "float32", ["ok", "ok", "ok"]),
        ({"accepted": 99, "widest_rejection": 1e-4}, "float32", ["ok", "ok", "ok"]),
        ({"accepted": 99, "widest_rejection": 0.1}, "float32", ["failed", "ok", "ok"]),
        ({"accepted": 99, "widest_rejection": 0.1}, "bfloat16", ["ok", "ok", "ok"]),
        ({"accepted": 99, "widest_rejection": 1.0}, "bfloat16", ["failed", "ok", "ok"]),
        ({"proposed": 99, "accepted": 99}, "float32", ["failed", "ok", "ok"]),
        ({"accepted": 99, "needless": 1}, "float32", ["failed", "ok", "ok"]),
        ({"tokens": 0, "proposed": 0, "accepted": 0}, "float32", ["failed", "ok", "ok"]),
        ({"mean_loss": 1e-3}, "float32", ["ok", "failed", "ok"]),
        ({"mean_loss": 1e-3}, "bfloat16", ["ok", "ok", "ok"]),
        ({"mean_loss": math.nan}, "bfloat16", ["ok", "failed", "ok"]),
        ({"max_teacher_gap": 0.05}, "float32", ["ok", "ok", "warning"]),
        ({"max_draft_gap": 0.05}, "float32", ["ok", "ok", "warning"]),
        ({"max_draft_gap": math.nan}, "float32", ["ok", "ok", "warning"]),
        ({"max_teacher_gap": 0.05}, "bfloat16", ["ok", "ok", "ok"]),
    ],
)
def test_verdict_of_the_self_test(changes, dtype, levels):
    findings = judge(replace(GOOD, **changes), dtype, kept_by_a_shut_gate=0)
    assert [f.level for f in findings] == levels
    assert all(bool(f.remedy) == (f.level != "ok") for f in findings)


@pytest.mark.parametrize(
    ("changes", "dtype", "who"),
    [
        ({}, "float32", None),
        ({"mean_teacher_gap": 0.1}, "bfloat16", None),
        ({"mean_teacher_gap": 0.1}, "float32", "teacher"),
        ({"mean_draft_gap": 0.5}, "bfloat16", "student"),
        ({"mean_draft_gap": math.nan}, "float32", "student"),
    ],
)
def test_verdict_of_the_pair(changes, dtype, who):
    found = judge_pair(replace(GOOD, **changes), dtype)
    assert found.level == ("failed" if who else "ok") and (who is None or f"the {who} is not read" in found.remedy)


@pytest.mark.parametrize(
    ("changes", "who"),
    [
        ({"mean_teacher_gap": 3.0}, None),
        ({"mean_teacher_gap": math.nan}, "teacher"),
        ({"mean_draft_gap": 0.1}, "student"),
    ],
)
def test_the_distance_of_a_rounded_teacher_is_no_fault(changes, who) -> None:
    found = judge_pair(replace(GOOD, **changes), "float32", "fp8")
    assert found.level == ("failed" if who else "ok") and "the teacher's weights are rounded (fp8)" in found.found
    assert who is None or f"the {who} is not read" in found.remedy


def test_what_rounds_the_teacher_is_left_out_where_one_model_is_both() -> None:
    ours = SKDConfig(teacher={"model_name_or_path": "t"}, vllm={"quantization": "fp8", "max_num_seqs": 4})
    given = {"data.max_len": 64, "train.seed": 1, "rollout.max_new_tokens": 8}
    given |= dict.fromkeys(
        f"vllm.{name}"
        for name in ("tensor_parallel_size", "enforce_eager", "enable_prefix_caching", "gpu_memory_utilization")
    )
    trial = make_trial("s", ours, given, [[1, 2]], cpu=False)
    assert (trial.spec.teacher, trial.spec.student, trial.spec.options) == ("s", "s", {"max_num_seqs": 4})
    pair = make_pair(trial, ours, "s")
    assert (pair.spec.teacher, pair.spec.student, pair.spec.options) == ("t", "s", ours.vllm)


def test_a_gate_that_never_rejects_is_found_out():
    found = judge(GOOD, "float32", kept_by_a_shut_gate=1)[0]
    assert found.level == "failed" and "keeps what K = 0 rejects" in found.remedy


def test_figures_of_traces():
    """Three tokens: kept, replaced, undrafted; transformers' logits are the engine's but for the second row."""
    logits = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 2.0, 1.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    shifted = logits.clone()
    shifted[1, 1] += 0.5
    logp, ids = shifted.log_softmax(-1), torch.tensor([0, 1, 0])
    own = logp.gather(1, ids[:, None]).squeeze(1)
    top = logp.topk(2)
    trace = Trace(
        response_ids=ids.int(),
        source=torch.tensor([Source.ACCEPTED, Source.REPLACED, Source.UNDRAFTED], dtype=torch.uint8),
        rejected_ids=torch.tensor([NOTHING, 2, NOTHING], dtype=torch.int32),
        draft_rank=torch.tensor([0, 1, NOTHING], dtype=torch.int32),
        student_logp=own.clone().index_fill_(0, torch.tensor([2]), math.nan),
        teacher_logp=own,
        kl=torch.zeros(3),
        student_entropy=torch.zeros(3),
        teacher_entropy=torch.zeros(3),
        top_overlap=torch.zeros(3),
        same_first=torch.zeros(3),
        teacher_rest_tempered=logp.scatter(1, torch.cat([top.indices, ids[:, None]], 1), -math.inf).logsumexp(-1),
        teacher_topk_ids=top.indices.int(),
        teacher_topk_logp=top.values,
    )
    found = measure(trace, logits, logits)
    assert (found.tokens, found.proposed, found.accepted, found.needless) == (3, 2, 1, 0)
    same = replace(trace, rejected_ids=torch.tensor([NOTHING, 1, NOTHING], dtype=torch.int32))
    assert measure(same, logits, logits).needless == 1
    assert found.widest_rejection == pytest.approx(0.5)
    gap = abs(float(own[1] - logits[1].log_softmax(-1)[1]))
    assert found.max_teacher_gap == found.max_draft_gap == pytest.approx(gap)
    assert found.mean_teacher_gap == pytest.approx(gap / 3)
    assert found.max_loss == pytest.approx(3 * found.mean_loss, rel=1e-4) and found.max_loss > 0.01


# --- the dry run's report ---

STEP = {
    "step": 1,
    "skd/loss": 0.5,
    "skd/accept_rate": 0.9,
    "time/rollout": 1.0,
    "time/train": 75.0,
    "time/sync": 0.1,
    "tokens_per_s": 50,
}


def step_report(folder: Path, **changes):
    (folder / "metrics.jsonl").write_text(json.dumps(STEP | changes) + "\n")
    return dry_run.report(RunFolder(folder), 0, {})


def test_report_of_a_good_step(tmp_path):
    step, times = step_report(tmp_path)
    assert step.level == "ok" and "loss 0.5" in step.found and "90.0%" in step.found
    assert "rollout 1.0s, train 1m15s, sync 0.1s" in times.found
    memory = dry_run.report(RunFolder(tmp_path), 0, {1: 3 << 30, 0: 2 << 30})[-1]
    assert memory.found.endswith("GPU 0 2.0 GiB, GPU 1 3.0 GiB")


@pytest.mark.parametrize("changes", [{"skd/loss": None}, {"skd/loss": math.inf}])
def test_report_of_a_loss_that_is_none(tmp_path, changes):
    assert step_report(tmp_path, **changes)[0].level == "failed"


def test_report_of_a_run_that_failed(tmp_path):
    Status(tmp_path).stage("failed", error="ValueError: no room")
    (found,) = dry_run.report(RunFolder(tmp_path), 1, {})
    assert found == Finding("dry run", "ValueError: no room", "failed", f"read {tmp_path / 'host.log'}")
    (silent,) = dry_run.report(RunFolder(tmp_path), 0, {})
    assert silent.level == "failed" and "without a step" in silent.found


def test_one_step_of_a_recipe(tmp_path):
    run = read_subject(str(RECIPE), SMALL).run
    short = dry_run.one_step(str(RECIPE), SMALL, run, tmp_path / "dry")
    assert short.folder.path == tmp_path / "dry" and not short.folder.path.exists()
    assert len(short.data["train"]) == 64
    given = vars(host_parser().parse_args(short.host_argv()))
    assert given["eval.dataset"] is None and given["ckpt.save_steps"] == -1
    assert given["data.max_samples"] == given["rollout.batch_size"] == 64
    assert not short.skd.eval.teacher and not short.skd.eval.at_start


def real(folder: Path) -> str:
    return f"skd.run_dir={folder / 'runs' / 'real'}"


def test_a_failed_dry_run_keeps_its_folder(tmp_path, monkeypatch):
    given = [*SMALL, real(tmp_path)]
    run = read_subject(str(RECIPE), given).run

    def fail(short):
        short.folder.status.stage("failed", error="RuntimeError: no")
        return 1

    monkeypatch.setattr(dry_run, "supervise", fail)
    (found,) = dry_run.run_dry(str(RECIPE), given, run)
    (kept,) = (tmp_path / "runs").iterdir()
    assert kept.name.startswith("real.dry-run-") and str(kept) in found.remedy


def test_ctrl_c_in_a_dry_run_leaves_no_folder(tmp_path, monkeypatch):
    given = [*SMALL, real(tmp_path)]
    run = read_subject(str(RECIPE), given).run
    monkeypatch.setattr(dry_run, "supervise", lambda short: 130)
    with pytest.raises(KeyboardInterrupt):
        dry_run.run_dry(str(RECIPE), given, run)
    assert not list((tmp_path / "runs").iterdir())


# --- the command ---


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """`check(*arguments)`: exit status and output of `skd check` with the quickstart, without the self-test."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()

    def run(*arguments: str, recipe: Path = RECIPE) -> tuple[int, str]:
        status = cli.main(["check", str(recipe), "--no-self-test", *SMALL, *arguments])
        return status, "".join(capsys.readouterr())

    return run


def test_a_good_recipe(check, tmp_path):
    real = tmp_path / "real"
    status, output = check(f"skd.run_dir={real}")
    assert status == 0 and "All good." in output
    for text in (
        "arithmetic/teacher",
        "1 steps of 64 responses",
        "the same 179 tokens",
        "teacher 1.8 M",
        "not yet seen",
    ):
        assert text in output, text
    assert not real.exists() and not list((tmp_path / "tmp").iterdir()), "a check leaves nothing behind"


def test_a_teacher_elsewhere(check):
    """Its server is asked, and nothing is counted for it here."""
    vocabulary = load_tokenizer(str(RECIPE.parent / "models" / "arithmetic" / "teacher"), "teacher")

    def tokenize(text: str) -> list[int]:
        return vocabulary(text, add_special_tokens=False).input_ids

    with serving(TeacherServer(tokenize=tokenize, max_model_len=64)) as teacher:
        given = (
            f"skd.teacher.url={teacher.url}",
            f"skd.teacher.server.model={NAME}",
            "skd.rollout.method=on_policy",
            "skd.loss.teacher_top_k=4",
        )
        status, output = check(*given)
        assert status == 1 and "takes 64 tokens, but the longest text has 176" in output
        teacher.max_model_len = 177
        status, output = check(*given)
    assert status == 0, output
    for text in (
        f"{NAME} at {teacher.url}, texts of up to 177 tokens",
        "(elsewhere, and not counted below)",
        "the student writes alone",
    ):
        assert text in output, text


def test_a_wrong_recipe_is_checked_as_far_as_it_goes(check):
    status, output = check("skd.rollout.top_k=400", "openrlhf.actor.num_gpus_per_node=9")
    assert status == 2
    assert "skd.rollout.top_k is 400" in output and "wait for ever" in output and "2 checks failed" in output
    assert "the same 179 tokens" in output and "teacher 1.8 M" in output, "the other checks run all the same"


def test_an_unknown_key(check):
    status, output = check("skd.rollout.topk=4")
    assert status == 2 and "did you mean 'skd.rollout.top_k'" in output


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("openrlhf.train.micro_batch_size=0", "train.micro_batch_size is 0, but must be 1 or more"),
        ("skd.vllm.max_num_seq=4", "did you mean 'max_num_seqs'"),
        ("openrlhf.data.max_samples=1", "max_samples leaves 1 of"),
    ],
)
def test_what_a_run_refuses_is_said_here(check, override, words):
    status, output = check(override)
    assert status == 2 and words in " ".join(output.split())


def test_a_file_that_is_no_recipe(check, tmp_path):
    status, output = check(recipe=tmp_path / "none.yaml")
    assert status == 2 and "there is no recipe" in output


def test_a_failure_without_a_wrong_recipe(check):
    status, output = check("openrlhf.vllm.num_engines=9")
    assert status == 1 and "wait for ever" in output


def test_wrong_versions_come_first(check, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "0.1")
    status, output = check()
    assert status == 1 and "the versions come first" in output and output.count("the tested version") == 6


@pytest.fixture
def own_recipe(tmp_path, tiny_pair):
    """`own_recipe(rows)`: a recipe for the tiny pair with a dataset of these rows."""

    def write(rows: list[dict]) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        host = {
            "actor": {"model_name_or_path": str(tiny_pair / "student")},
            "data": {"prompt_dataset": str(tmp_path / "rows.jsonl"), "max_len": 64, "max_samples": 6},
            "rollout": {"batch_size": 4},
            "train": {"batch_size": 4},
        }
        ours = {
            "teacher": {"model_name_or_path": str(tiny_pair / "teacher")},
            "rollout": {"max_new_tokens": 16, "top_k": 4},
            "loss": {"teacher_top_k": 8},
        }
        (tmp_path / "own.yaml").write_text(json.dumps({"openrlhf": host, "skd": ours}))
        return tmp_path / "own.yaml"

    return write


def test_a_dataset_of_ones_own(own_recipe, capsys):
    recipe = own_recipe([{"input": "abc"}] * 9)
    assert cli.main(["check", str(recipe), "--no-self-test"]) == 0
    output = capsys.readouterr().out
    assert "6 prompts of 3 to 3 tokens; 1 steps of 4 responses" in output.replace("\n", " ")


@pytest.mark.parametrize(
    ("rows", "override", "words"),
    [
        ([{"input": "abc"}] * 3, "skd.rollout.seed=1", "there are 3 prompts"),
        ([{"input": "abc"}] * 4 + [{"text": "abc"}], "skd.rollout.seed=1", "line 5: 'input' is missing or null"),
        ([{"input": "abc"}] * 4, "openrlhf.data.apply_chat_template=true", "has no chat template"),
    ],
)
def test_a_dataset_that_makes_no_prompts(own_recipe, capsys, monkeypatch, rows, override, words):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["check", str(own_recipe(rows)), "--no-self-test", override]) == 2
    assert words in capsys.readouterr().out


def test_ctrl_c_shows_what_was_found(check, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("skd_plugin.check.checks.check_memory", stop)
    status, output = check()
    assert status == 130 and "Stopped" in output and "the same 179 tokens" in output and "All good" not in output
    assert not list((tmp_path / "tmp").iterdir())


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--help"])
    assert ended.value.code == 0 and "--dry-run" in capsys.readouterr().out


def test_the_tiny_tokenizer_is_what_these_tests_think(tiny_pair):
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "student")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
