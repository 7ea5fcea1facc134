"""``beagle.speculate``: transformers' own ``generate``, with drafts and without, gives the same."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    pipeline,
)

import beagle
from beagle import hf
from beagle.drafters.checkpoint import save_head
from beagle.errors import BeagleError
from beagle.targets.loading import load_model
from conftest import FAMILIES, REAL_CACHE, tiny_head, tiny_model, tiny_target, tiny_tokenizer
from speculating import PLAN, PROMPT, both, plain

PADDED = torch.tensor([[0, 0, 7, 8, 9, 7], [3, 4, 5, 6, 3, 4], [0, 11, 12, 13, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}


@pytest.fixture
def model():
    model = tiny_model()
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def fast(model):
    return beagle.speculate(model, "lookup", plan=PLAN)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_without_drafts(family, tmp_path):
    model = tiny_model(family)
    save_head(tiny_head(tiny_target(family)), tmp_path, target="tiny", dtype=torch.float32, meta={})
    fast = beagle.speculate(model, f"{tmp_path}+lookup", plan=PLAN)
    accepted = 0
    for start in (3, 40):
        prompt = torch.arange(start, start + 9)[None].repeat(1, 2)
        expected, answer = both(model, prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
        assert torch.equal(answer, expected)
        assert fast.stats.tokens == 40
        accepted += fast.stats.tokens - 1 - fast.stats.passes
    assert accepted > 0


@pytest.mark.parametrize(
    "options",
    [SAMPLED, {"do_sample": True, "top_k": 0}, {"do_sample": True, "temperature": 0.4, "min_p": 0.05},
     {**SAMPLED, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}],
    ids=str,
)  # fmt: skip
def test_samples_are_those_without_drafts(model, fast, options):
    """The same seed gives the same tokens, so each follows the same distribution; and torch's generator goes on alike."""
    accepted = 0
    for seed in range(5):
        expected, answer = both(model, PROMPT, max_new_tokens=30, seed=seed, **options)
        assert torch.equal(answer, expected)
        after = torch.rand(1)
        torch.manual_seed(seed)
        plain(model, PROMPT, max_new_tokens=30, **options)
        assert torch.equal(after, torch.rand(1))
        accepted += fast.stats.tokens - 1 - fast.stats.passes
    assert accepted > 0


def test_loading_drafts_takes_nothing_from_the_seed(model, tmp_path):
    save_head(tiny_head(tiny_target()), tmp_path, target="tiny", dtype=torch.float32, meta={})
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    beagle.speculate(model, str(tmp_path))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_itself_stays_as_it_is(dtype):
    model = tiny_model().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention, config = model.config._attn_implementation, model.config.to_dict()
    logits, answer = model(PROMPT).logits, plain(model, PROMPT, max_new_tokens=20)
    fast = beagle.speculate(model, "lookup", plan=PLAN)
    model.generate(PROMPT, max_new_tokens=20)
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(model(PROMPT).logits, logits)
    assert torch.equal(plain(model, PROMPT, max_new_tokens=20), answer)
    fast.remove()
    assert "generate" not in model.__dict__
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20), answer)
    model(PROMPT).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_weights_are_noticed(dtype):
    model = tiny_model().to(dtype)
    beagle.speculate(model, "lookup", plan=PLAN)
    first = model.generate(PROMPT, max_new_tokens=8)
    model.load_state_dict(tiny_model(seed=1).state_dict())
    expected, answer = both(model, PROMPT, max_new_tokens=8)
    assert torch.equal(answer, expected)
    assert not torch.equal(answer, first)


def test_a_copied_model_answers_by_its_own_weights(model, fast):
    other = copy.deepcopy(model)
    other.load_state_dict(tiny_model(seed=1).state_dict())
    for one in (model, other, model):
        expected, answer = both(one, PROMPT, max_new_tokens=12)
        assert torch.equal(answer, expected)


class Often(StoppingCriteria):
    """Ends at the seventh token 6, and remembers what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append(input_ids[0].tolist())
        return (input_ids == 6).sum(1) >= 7


class Banned(LogitsProcessor):
    """Bans the token before the last one, and remembers what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores):
        self.shown.append(input_ids[0].tolist())
        return scores.index_fill(1, input_ids[0, -2:-1], -torch.inf)


class Recorder:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(value.tolist())

    def end(self):
        self.events.append("end")


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_processors_criteria_and_streamers_meet_what_they_would_without_drafts(model, fast, sampling):
    seen = []
    answers = []
    for generate in (type(model).generate.__get__(model), model.generate):
        processor, criterion, streamer = Banned(), Often(), Recorder()
        torch.manual_seed(3)
        answers.append(
            generate(
                PROMPT,
                max_new_tokens=40,
                logits_processor=[processor],
                stopping_criteria=[criterion],
                streamer=streamer,
                **sampling,
            )
        )
        seen.append((processor.shown, criterion.shown, streamer.events))
    assert torch.equal(*answers)
    assert seen[0] == seen[1]
    assert seen[1][2][0] == PROMPT.tolist()
    assert seen[1][2][-1] == "end"


def test_a_criterion_ends_the_answer_inside_an_accepted_path(model, fast):
    expected, answer = both(model, PROMPT, max_new_tokens=40, stopping_criteria=[criterion := Often()])
    assert torch.equal(answer, expected)
    assert int((answer == 6).sum()) == 7
    assert criterion.shown[-1] == answer[0].tolist()
    assert fast.stats.tau > 1.2  # or nothing was accepted


def test_several_ends_of_the_answer(model, fast):
    long = model.generate(PROMPT, max_new_tokens=40, eos_token_id=None)[0, 6:].tolist()
    ends = [long[-1], long[9]]
    expected, answer = both(model, PROMPT, max_new_tokens=40, eos_token_id=ends)
    assert torch.equal(answer, expected)
    assert answer[0, -1] in ends
    assert answer.shape[1] < 46


def test_time_ends_the_answer(model, fast):
    assert model.generate(PROMPT, max_new_tokens=40, max_time=0.0).shape[1] == 7


def test_allowed_tokens(model, fast):
    expected, answer = both(
        model, PROMPT, max_new_tokens=20, prefix_allowed_tokens_fn=lambda row, ids: [row + 5, 6, int(ids[-1]) % 9 + 3]
    )
    assert torch.equal(answer, expected)


def test_text_streams_to_another_thread(model, fast):
    tokenizer = tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
    options = {"max_new_tokens": 20, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(plain(model, PROMPT, max_new_tokens=20)[0, 6:]).split()


def test_two_threads_at_once(model, fast):
    prompts = [PROMPT, PROMPT.flip(1), PROMPT + 9, PROMPT + 20]
    answers = [None] * 4

    def ask(i):
        answers[i] = model.generate(prompts[i], max_new_tokens=40)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert torch.equal(answer, plain(model, prompt, max_new_tokens=40))


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_the_dictionary_of_results(model, fast, sampling):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 15}
    expected, answer = both(model, PROMPT, **options, **sampling)
    assert type(answer) is type(expected)
    assert torch.equal(answer.sequences, expected.sequences)
    for ours, theirs in ((answer.scores, expected.scores), (answer.logits, expected.logits)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert all(answer.get(name) is None for name in hf.CACHE_NAMES)
    short = model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    assert (short.scores, short.logits) == (None, None)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_padded_rows_of_a_batch(family):
    model = tiny_model(family)
    fast = beagle.speculate(model, "lookup", plan=PLAN)
    free = plain(model, PADDED, attention_mask=MASK, max_new_tokens=40, eos_token_id=None)
    end = int(free[0, 12])  # so that rows end at different lengths
    expected, answer = both(model, PADDED, attention_mask=MASK, max_new_tokens=40, eos_token_id=end, pad_token_id=0)
    assert torch.equal(answer, expected)
    assert (answer == 0).sum() > 3
    assert fast.stats.tokens > fast.stats.passes + 3
    penalty = {"repetition_penalty": 1.3, "bad_words_ids": [[19]], "min_new_tokens": 3}
    expected, answer = both(model, PADDED, attention_mask=MASK, max_new_tokens=20, pad_token_id=0, **penalty)
    assert torch.equal(answer, expected)


def test_one_padded_row(model, fast):
    expected, answer = both(model, PADDED[:1], attention_mask=MASK[:1], max_new_tokens=20)
    assert torch.equal(answer, expected)


def test_several_samples_of_a_prompt(model, fast):
    torch.manual_seed(0)
    answers = model.generate(PROMPT, max_new_tokens=12, num_return_sequences=3, eos_token_id=None, **SAMPLED)
    torch.manual_seed(0)
    singly = [model.generate(PROMPT, max_new_tokens=12, eos_token_id=None, **SAMPLED) for _ in range(3)]
    assert torch.equal(answers, torch.cat(singly))
    assert not torch.equal(answers[0], answers[1])


def test_inference_mode_leaves_nothing_behind(model):
    with torch.inference_mode():
        beagle.speculate(model, "lookup", plan=PLAN)
        model.generate(PROMPT, max_new_tokens=10)
    expected, answer = both(model, PROMPT, max_new_tokens=10)
    assert torch.equal(answer, expected)


def test_pipelines_draft(model, fast):
    ask = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    options = {"max_new_tokens": 40, "do_sample": False, "return_full_text": False}
    text = ask("w3 w4 w5 w3 w4", **options)[0]["generated_text"]
    assert fast.stats.tokens > fast.stats.passes + 1
    fast.remove()
    assert ask("w3 w4 w5 w3 w4", **options)[0]["generated_text"] == text


def past():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    return cache


class Foreign(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


BATCH = {"input_ids": PADDED, "attention_mask": MASK}
REFUSED = {
    "num_beams": {"num_beams": 2},
    "num_beams=3": {"num_beams": 3, "num_return_sequences": 2, **SAMPLED},
    "contrastive_search": {"penalty_alpha": 0.6, "top_k": 4},
    "assisted_generation": {"prompt_lookup_num_tokens": 4},
    "assistant_model": {"assistant_model": tiny_model()},
    "custom_generate": {"custom_generate": print},
    "past_key_values of an earlier call": {"past_key_values": past()},
    "cache of an earlier call": {"cache": past()},
    "cache_implementation='quantized'": {"cache_implementation": "quantized"},
    "cache_implementation='paged'": {"cache_implementation": "paged"},
    "token_healing": {"token_healing": True, "tokenizer": tiny_tokenizer()},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "attention_mask": {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])},
    "padding_side": {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])},
    "position_ids": {"position_ids": torch.arange(6)[None] + 1},
    "inputs_embeds": {"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 32)},
    "max_new_tokens=600 after a prompt of 6 tokens goes beyond the model's context of 512; ask for at most 506": {
        "max_new_tokens": 600
    },
    "a streamer for several rows": {**BATCH, "streamer": Recorder()},
    "Foreign for several rows": {**BATCH, "logits_processor": [Foreign()]},
    "PrefixConstrainedLogitsProcessor for several rows": {**BATCH, "prefix_allowed_tokens_fn": lambda *_: [3]},
    "MaxTimeCriteria for several rows": {**BATCH, "max_time": 5.0},
    "output_scores": {**BATCH, "return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_be_answered_otherwise_is_refused(model, fast, message):
    options = {"input_ids": PROMPT, **REFUSED[message]}
    with pytest.raises(BeagleError, match=message) as refused:
        model.generate(**{name: value for name, value in options.items() if value is not None})
    assert "\n" not in str(refused.value)


def test_a_model_in_training_is_refused(model, fast):
    with pytest.raises(BeagleError, match=r"call model\.eval\(\)"):
        model.train().generate(PROMPT)
    assert model.training


def test_bad_drafts_and_models(model, tmp_path):
    for draft, message in (
        ("none", "leave speculate out"),
        ("lokup", "lokup"),
        ("head", "no head is shipped"),
        ("model:x", "tokenizer="),
    ):
        with pytest.raises(BeagleError, match=message):
            beagle.speculate(model, draft)
        assert "generate" not in model.__dict__
    with pytest.raises(BeagleError, match="Linear"):
        beagle.speculate(nn.Linear(2, 2))


def test_a_small_model_drafts(model, tmp_path):
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    fast = beagle.speculate(model, f"model:{tmp_path}", tokenizer=tiny_tokenizer(), plan=PLAN)
    expected, answer = both(model, PROMPT, max_new_tokens=20)
    assert torch.equal(answer, expected)
    assert fast.stats.tau > 2


@pytest.fixture(scope="module")
def smollm2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
        model, tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu")
        return model, tokenizer, beagle.speculate(model, name="smollm2-135m", plan=PLAN)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}])
def test_smollm2(smollm2, sampling):
    model, tokenizer, fast = smollm2
    inputs = tokenizer("The first ten prime numbers are", return_tensors="pt")
    expected, answer = both(model, **inputs, max_new_tokens=32, **sampling)
    assert torch.equal(answer, expected)
    assert fast.stats.tau > 1.2


@pytest.mark.slow
@pytest.mark.network
def test_stop_strings(smollm2):
    model, tokenizer, _ = smollm2
    inputs = tokenizer("One, two, three, four,", return_tensors="pt")
    for options in (
        {"stop_strings": ["even, eig"], "max_new_tokens": 24},
        {"generation_config": GenerationConfig(stop_strings="even, eig", max_new_tokens=24, do_sample=False)},
    ):
        expected, answer = both(model, **inputs, tokenizer=tokenizer, **options)
        assert torch.equal(answer, expected)
        assert tokenizer.decode(answer[0]).endswith("seven, eight")
    with pytest.raises(BeagleError, match="stop_strings need the model's tokenizer"):
        model.generate(**inputs, stop_strings=["even, eig"])
