"""The two commands that talk: the conversation, and the demonstration."""

from __future__ import annotations

from beagle import model as model_module
from beagle.errors import BeagleInternalError
from beagle.model import Model


def test_chat_remembers_and_forgets(folders, beagle, monkeypatch):
    asked = []
    stream = Model.stream
    monkeypatch.setattr(Model, "stream", lambda self, m, **rest: asked.append(m) or stream(self, m, **rest))
    script = "w3\n\nw9 w4\n/reset\nw4\n/exit\nw5\n"
    ended = beagle("chat", *folders.options, "-n", 6, "--system", "w8", stdin=script)
    assert ended.code == 0
    assert ended.out.count("6 tokens") == 3
    assert [[m["role"] for m in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert [m["content"] for m in asked[2]] == ["w8", "w4"]
    assert asked[1][2]["content"] in ended.out
    assert beagle("chat", *folders.options, stdin="").code == 0  # end of input


def test_interrupted_chat_goes_on(folders, beagle, monkeypatch):
    decode = model_module.decode
    calls = []

    def once(*arguments, **options):
        calls.append(1)
        for step in decode(*arguments, **options):
            yield step
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "decode", once)
    ended = beagle("chat", *folders.options, "-n", 6, stdin="w3\nw4\n/quit\n")
    assert (ended.code, len(calls)) == (0, 2)
    assert "(stopped)" in ended.out


def test_demo_shows_the_same_text(folders, beagle):
    ended = beagle("demo", *folders.options, "-n", 6)
    assert ended.code == 0
    table = ended.out[ended.out.index("the same text, faster") :].splitlines()
    assert any("same text" in line for line in table[1:3])
    rows = [line.rstrip() for line in table if "×" in line]
    assert [row.endswith(" yes") for row in rows] == [True, True, True, False]
    assert rows[-1].endswith(" 3 of 3")


def test_demo_without_a_head_or_with_other_text(folders, beagle, monkeypatch):
    beagle("demo", *folders.plain).refusal(folders.target, "--draft")
    stream = Model.stream

    def other(self, prompt, draft=True, **rest):
        return stream(self, prompt if draft else "w9", draft=draft, **rest)

    monkeypatch.setattr(Model, "stream", other)
    assert BeagleInternalError.exit_code == 1
    beagle("demo", *folders.options, "-n", 6).refusal("differ", code=1)
    assert beagle("demo", *folders.options, "-n", 6, "--fast").code == 0
