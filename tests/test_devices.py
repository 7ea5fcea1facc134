"""Targets that one device does not hold: parts on disk, or every layer divided among processes."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from beagle.errors import BeagleError
from beagle.model import Model
from beagle.ranks import Ranks
from beagle.targets import devices
from beagle.targets.loading import load_target
from conftest import tiny_drafter
from launching import Launch
from training_runs import RECIPE

DISK = {
    "layers": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
               "model.layers.1": "disk", "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu"},
    "embedding and LM head": {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers": "cpu",
                              "model.norm": "disk", "lm_head": "disk"},
    "everything": {"": "disk"},
}  # fmt: skip
PROMPT = [1, 9, 20, 33, 7]


@pytest.fixture(scope="module")
def whole(folders):
    return load_target(str(folders.target), dtype="float32", device="cpu")


@pytest.mark.parametrize("device_map", ["auto", *DISK.values()], ids=["auto", *DISK])
def test_an_offloaded_target_answers_as_the_whole_one(folders, whole, device_map):
    target = load_target(str(folders.target), dtype="float32", device_map=device_map)
    assert target.digest == whole.digest
    assert target.device == whole.device
    if device_map == "auto":
        assert not any(weight.is_meta for weight in target.model.parameters())
    else:
        assert any(weight.is_meta for weight in target.model.parameters())
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        expected = Model(whole).generate(PROMPT, max_new_tokens=24, ignore_eos=True, **options)
        found = Model(target, tiny_drafter(target)).generate(PROMPT, max_new_tokens=24, ignore_eos=True, **options)
        assert found.token_ids == expected.token_ids
    ids = torch.tensor([PROMPT])
    states = [own.prefill(ids, own.new_cache(1, 16)) for own in (target, whole)]
    torch.testing.assert_close(*states)
    torch.testing.assert_close(target.head_rows()[0], whole.head_rows()[0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device_map": "balanced"}, "device map 'balanced' is unknown; use auto"),
        ({"device_map": "auto", "device": "cpu"}, "leave device 'cpu' out"),
        ({"device_map": "auto", "quantize": "int8"}, "quantize int8 does not go with a device map"),
        ({"tensor_parallel": Ranks(0, 2), "quantize": "int4"}, "quantize int4 does not go with tensor parallelism"),
        ({"tensor_parallel": Ranks(0, 2), "device_map": "auto"}, "exclude each other"),
    ],
)
def test_what_does_not_go_together_is_named(folders, options, named):
    with pytest.raises(BeagleError, match=named):
        load_target(str(folders.target), **options)


def test_a_map_over_several_gpus_is_refused(whole):
    whole.model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": "cpu"}
    try:
        with pytest.raises(BeagleError, match=r"lays its layers over 2 GPUs.*tensor parallelism"):
            devices.refuse_unserved(whole.model, "tiny", Ranks())
    finally:
        del whole.model.hf_device_map


def test_a_family_without_a_plan_is_refused(whole):
    with pytest.raises(BeagleError, match="no plan to divide layers of type llama"):
        devices.refuse_unserved(whole.model, "tiny", Ranks(0, 2))


@pytest.mark.parametrize("options", [[], ["--temperature", "0.9", "--seed", "3"]], ids=["greedy", "sampled"])
def test_processes_that_share_a_target_answer_as_one_does(folders, beagle, tmp_path, options):
    """With a tree as large as costs say, which are measured in each of them and need not be the same."""
    words = ["generate", "w9 w20 w33", *folders.options[:-2], "-n", "16", "--ignore-eos", *options]
    alone = beagle(*words)
    assert alone.code == 0
    launch = Launch(tmp_path, [[*words, "--tensor-parallel"]] * 2)
    assert launch.codes() == [0, 0], launch.errors()
    assert launch.errors()[0].splitlines()[0] == alone.out.strip()
    assert launch.errors()[1] == ""


def test_an_evaluation_of_a_shared_target(folders, beagle, questions, tmp_path):
    words = ["eval", "--questions", questions, *folders.options[:-2], "--modes", "beagle", "--limit", 2, "-n", 6]
    launch = Launch(
        tmp_path / "logs", [[*map(str, words), "--tensor-parallel", "--json", str(tmp_path / "both.json")]] * 2
    )
    assert launch.codes() == [0, 0], launch.errors()
    ended = beagle(*words, "--json", tmp_path / "alone.json")
    assert ended.code == 0, ended
    both, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("both", "alone"))
    assert texts(both) == texts(alone)
    assert launch.errors()[1] == ""


def texts(result: dict) -> list[tuple]:
    return [(record["id"], record["mode"], [turn["ids"] for turn in record["turns"]]) for record in result["records"]]


def test_a_head_learns_from_live_states_of_a_shared_target(folders, beagle, prompts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"answers": RECIPE["answers"] | {"states": "live"}}))
    words = ["train", "--config", recipe, "--target", folders.target]
    ended = beagle(*words, "--prompts", prompts, "--device", "cpu", "--out", tmp_path / "alone")
    assert ended.code == 0, ended
    words = [*map(str, words), "--data", str(tmp_path / "alone" / "data"), "--tensor-parallel"]
    launch = Launch(tmp_path / "logs", [[*words, "--out", str(tmp_path / "both")]] * 2)
    assert launch.codes() == [0, 0], launch.errors()
    losses = [
        [float(line.split(",")[2]) for line in (tmp_path / run / "log.csv").read_text().splitlines()[1:]]
        for run in ("alone", "both")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert (tmp_path / "both" / "head" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["generate", "w5"], "2 processes would do the same work; add --tensor-parallel"),
        (["serve"], "beagle serve is one process, and a launcher has started 2"),
        (["train", "--out", "run", "--device-map", "auto"], "--device-map auto: each of 2 processes"),
    ],
)
def test_processes_for_nothing_are_refused(folders, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "shard-00000.safetensors").touch()
    launch = Launch(tmp_path, [[*words, *([] if words == ["serve"] else ["--target", str(folders.target)])]] * 2)
    assert launch.codes() == [2, 2], launch.errors()
    assert named in "".join(launch.errors())


def test_tensor_parallelism_needs_processes(folders, beagle):
    ended = beagle("generate", "w5", "--target", folders.target, "--tensor-parallel")
    ended.refusal("--tensor-parallel needs several processes", "torchrun")


def test_attention_that_plans_every_shape_is_not_taken_on_cuda():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        devices.refuse_planned_attention(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        devices.refuse_planned_attention(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
