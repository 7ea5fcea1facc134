"""The command: what it prints where, and which exit code an error has."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from beagle import model as model_module
from beagle.cli import main
from beagle.errors import BeagleError
from conftest import Outcome, tiny_model, tiny_tokenizer

PROMPT = "w3 w4 w5"


@pytest.fixture
def answer(folders, beagle) -> str:
    """What plain decoding prints."""
    return beagle("generate", PROMPT, *folders.plain, "-n", 24, "-q").out


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--exact"],
        ["--tree", "chain", "--depth", "3"],
        ["--tree", "static"],
        ["--tree", "dynamic", "--nodes", "6", "--tree-top-k", "2"],
    ],
)
def test_answers_are_those_of_plain_decoding(folders, beagle, answer, extra):
    ended = beagle("generate", PROMPT, *folders.options, "-n", 24, *extra)
    assert ended.code == 0
    assert ended.out == answer
    assert len(answer.split()) > 3
    assert "24 tokens" in ended.err
    if "--tree" in extra:  # else a busy machine's costs may say that no draft is worth its time
        assert "step-α" in ended.err


@pytest.mark.parametrize("extra", [[], ["--exact"], ["--tree", "chain"]])
@pytest.mark.parametrize("draft", ["lookup", "model:"])
def test_other_drafters_answer_the_same(folders, beagle, answer, draft, extra):
    if draft == "model:":
        draft += str(folders.target)  # the target itself, loaded once more
    ended = beagle("generate", PROMPT, *folders.plain, "--draft", draft, "-n", 24, *extra)
    assert (ended.code, ended.out) == (0, answer)
    assert "24 tokens" in ended.err


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_target_answers_the_same_with_drafts(folders, beagle, answer, kind):
    options = ["-n", 24, "--exact", "--quantize", kind]
    plain = beagle("generate", PROMPT, *folders.plain, *options)
    drafted = beagle("generate", PROMPT, *folders.options, *options)
    assert (plain.code, drafted.code) == (0, 0)
    assert plain.out == drafted.out
    # width 48 of the tiny MLP is no multiple of int4's groups
    assert ("int4: 3 layers" in drafted.err) == (kind == "int4")


def test_unknown_quantisation_is_refused_before_anything_is_loaded(beagle):
    beagle("generate", PROMPT, "--target", "no-such", "--draft", "none", "--quantize", "int3").refusal(
        "int3", "int8 or int4"
    )


def test_drafters_that_do_not_fit_are_refused(folders, beagle, tmp_path):
    foreign = tiny_tokenizer()
    foreign.add_tokens(["w64"])
    tiny_model(vocab_size=65).save_pretrained(tmp_path / "foreign")
    foreign.save_pretrained(tmp_path / "foreign")
    ended = beagle("generate", PROMPT, *folders.plain, "--draft", f"model:{tmp_path / 'foreign'}")
    ended.refusal(tmp_path / "foreign", folders.target, "vocabulary", "tokenizer")
    beagle("generate", PROMPT, *folders.plain, "--draft", "model:").refusal("draft model ''", "empty")
    beagle("generate", PROMPT, *folders.plain, "--draft", "model:nowhere").refusal("draft model 'nowhere'", "spelling")


def test_help_names_the_drafters(beagle):
    text = " ".join(beagle("generate", "--help").out.replace("│", " ").split())
    for word in ("auto", "none", "lookup", "model:NAME", "model:Qwen/Qwen2.5-0.5B-Instruct"):
        assert word in text


def test_sampled_answers_depend_on_the_seed(folders, beagle):
    def text(seed, options):
        sampling = ["--temperature", 1.5, "--top-k", 20, "--top-p", 0.9, "--seed", seed]
        return beagle("generate", PROMPT, *options, "-n", 12, *sampling).out

    assert text(1, folders.options) == text(1, folders.plain) != text(2, folders.options)


def test_quiet_prints_the_answer_alone(folders, beagle, answer):
    ended = beagle("generate", PROMPT, *folders.options, "-n", 24, "-q")
    assert (ended.code, ended.out) == (0, answer)
    assert "token/s" not in ended.err


def test_pieces_are_printed_while_the_answer_grows(folders, beagle, answer, monkeypatch):
    events = []
    decode = model_module.decode

    def watched(*arguments, **options):
        for step in decode(*arguments, **options):
            events.append("step")
            yield step

    class Recorder(io.StringIO):
        def write(self, text):
            events.append(text)
            return super().write(text)

        def flush(self):
            events.append("flush")

    monkeypatch.setattr(model_module, "decode", watched)
    monkeypatch.setattr(sys, "stdout", recorder := Recorder())
    assert beagle("generate", PROMPT, *folders.options, "-n", 24, "-q").code == 0
    assert recorder.getvalue() == answer
    first = events.index(answer.split()[0])
    assert "step" in events[first:]
    assert "flush" in events[first : first + events[first:].index("step")]


def test_stop_ends_the_answer_before_it(folders, beagle, answer):
    last = answer.split()[-1]
    ended = beagle("generate", PROMPT, *folders.options, "-n", 24, "--stop", "nowhere", "--stop", last)
    assert (ended.code, ended.out) == (0, answer.split(last)[0] + "\n")


def test_standard_input(folders, beagle, answer):
    assert beagle("generate", "-", *folders.options, "-n", 24, stdin=PROMPT + "\n").out == answer


def test_raw_prompts_have_no_template(folders, beagle, monkeypatch):
    seen = []
    decode = model_module.decode
    monkeypatch.setattr(model_module, "decode", lambda decoder, job: seen.append(job.ids) or decode(decoder, job))
    beagle("generate", PROMPT, *folders.options, "-n", 2, "--raw")
    beagle("generate", PROMPT, *folders.options, "-n", 2)
    assert seen == [[3, 4, 5], [1, 3, 4, 5, 1]]


def test_bad_requests(folders, beagle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text(PROMPT)
    beagle("generate", "prompt.txt", *folders.options).refusal("prompt.txt", "beagle generate - <")
    beagle("generate", "", *folders.options).refusal("prompt is empty")
    beagle("generate", "-", *folders.options, stdin=" \n").refusal("prompt is empty")
    beagle("generate", PROMPT, *folders.options, "--stop", "").refusal("stop")
    beagle("generate", PROMPT, *folders.options, "--top-p", 0).refusal("top_p")
    beagle("generate", PROMPT, *folders.options, "--tree", "bush").refusal("bush", "static")
    beagle("generate", "w3 " * 600, *folders.options).refusal("512", "shorten")


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "w3", "-n", "0"], ["generate", "w3", "--depth", "0"], ["generate", "w3", "--what"],
     ["sing"], ["train"], ["research", "compare"], ["generate", "w3", "--temperature", "-1"]],
)  # fmt: skip
def test_usage_errors(beagle, arguments):
    ended = beagle(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("command", sorted(typer.main.get_command(main.app).commands))
def test_every_command_has_help(beagle, command):
    ended = beagle(command, "--help")
    assert ended.code == 0
    assert ("--target" in ended.out) == (command not in ("report", "view", "research", "push"))


def test_failures_of_ours_have_code_1(folders, beagle, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("some [b]reason\nsecond line")

    monkeypatch.setattr(model_module, "decode", broken)
    ended = beagle("generate", PROMPT, *folders.options)
    assert ended.code == 1
    line = ended.err.strip().splitlines()[-1]
    assert line == "failure of ours: RuntimeError: some [b]reason; run with --debug for the traceback"
    monkeypatch.setattr(sys, "argv", ["beagle", "--debug", "generate", PROMPT, *folders.options])
    with pytest.raises(RuntimeError, match="reason"):
        main.run()


def test_debug_raises(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["beagle", "generate", PROMPT, "--target", "nowhere", "--debug"])
    with pytest.raises(BeagleError, match="nowhere"):
        main.run()


def test_interrupting_an_answer(folders, beagle, monkeypatch):
    decode = model_module.decode

    def interrupted(*arguments, **options):
        steps = decode(*arguments, **options)
        yield next(steps)
        yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "decode", interrupted)
    ended = beagle("generate", PROMPT, *folders.options)
    assert ended.code == 130
    assert ended.out.startswith("w")  # what had come by then
    assert "Traceback" not in ended.err


def test_an_empty_prompt_prints_nothing(folders, beagle):
    assert beagle("generate", " ", *folders.plain, "-q").out == ""


def test_drafts_that_are_none(folders, beagle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beagle("generate", PROMPT, *folders.plain, "--draft", "").refusal("draft ''", "lookup")
    beagle("generate", PROMPT, *folders.plain, "--draft", "lokup").refusal("draft 'lokup'", "lookup")
    beagle("generate", PROMPT, *folders.plain, "--draft", "head").refusal("no head is shipped", folders.target)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["generate", PROMPT, "-n", "4"], ["generate", "--help"]])
def test_a_full_disk_behind_standard_output(folders, tmp_path, arguments):
    command = [sys.executable, "-m", "beagle", *arguments]
    with Path("/dev/full").open("w") as full:
        options = folders.plain if "-n" in arguments else []
        ended = subprocess.run(
            [*command, *options], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=300
        )
    Outcome(ended.returncode, "", ended.stderr).refusal("the output", "No space left on device")


def test_as_a_process(folders, tmp_path):
    command = [sys.executable, "-m", "beagle", "generate", "-", *folders.options, "-n", "4"]
    ended = subprocess.run(command, input=PROMPT, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
    assert "Warning" not in ended.stderr


def test_ctrl_c_while_it_starts():
    code = """
import sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "beagle.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
from beagle.__main__ import run
run()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (130, "stopped\n")
