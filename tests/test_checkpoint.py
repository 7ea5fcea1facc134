"""Draft checkpoints: a round trip, and one clear line for each way they can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from beagle.drafters.checkpoint import HEADS, find_head, load_head, save_head, shipped_head
from beagle.errors import BeagleError
from conftest import LIVELY, tiny_head, tiny_target


@pytest.fixture(params=LIVELY)
def folder(request, target, tmp_path):
    head = tiny_head(target, architecture=request.param)
    save_head(head, tmp_path / "head", target=target.name, dtype=torch.float32, meta={"note": 1})
    return tmp_path / "head"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, target) -> str:
    with pytest.raises(BeagleError) as caught:
        load_head(folder, target)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert ";" in message  # what is wrong; what to do
    return message


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"newest_state": "none", "token_in_mlp": False, "num_kv_heads": 2},
        {"architecture": "eagle"},
        {"architecture": "eagle", "num_kv_heads": 2},
    ],
    ids=str,
)
def test_roundtrip(target, tmp_path, overrides):
    head = tiny_head(target, seed=4, **overrides)
    save_head(head, tmp_path, target=target.name, dtype=torch.float32, meta={"note": 1})
    loaded = load_head(tmp_path, target)
    assert type(loaded) is type(head)
    assert loaded.config == head.config
    assert loaded.state_dict().keys() == head.state_dict().keys()
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not list(tmp_path.glob(".*"))
    assert json.loads((tmp_path / "config.json").read_text())["meta"] == {"note": 1}


@pytest.mark.parametrize("architecture", LIVELY)
def test_int8_on_disk_is_half_a_step_off(target, tmp_path, architecture):
    head = tiny_head(target, architecture=architecture)
    save_head(head, tmp_path, target=target.name, dtype=torch.int8, meta={})
    stored = load_file(tmp_path / "model.safetensors")
    loaded = load_head(tmp_path, target).state_dict()
    assert loaded.keys() == head.state_dict().keys()
    for name, tensor in head.state_dict().items():
        if tensor.ndim == 2:
            assert stored[name].dtype == torch.int8
            step = tensor.abs().amax(1, keepdim=True) / 127
            assert ((loaded[name] - tensor).abs() <= 0.51 * step).all(), name
        else:
            assert torch.allclose(loaded[name].float(), tensor.float(), rtol=2**-8), name


def test_a_head_written_over_one_in_parts_is_the_one_that_is_read(target, tmp_path):
    old, new = tiny_head(target, seed=1), tiny_head(target, seed=2)
    save_head(old, tmp_path, target=target.name, dtype=torch.float32, meta={})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    save_head(new, tmp_path, target=target.name, dtype=torch.float32, meta={})
    loaded = load_head(tmp_path, target).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in new.state_dict().items())


def test_int8_matrix_without_its_scale(target, tmp_path):
    save_head(tiny_head(target), tmp_path, target=target.name, dtype=torch.int8, meta={})
    scale = next(name for name in load_file(tmp_path / "model.safetensors") if name.endswith(".scale"))
    edit_weights(tmp_path, lambda tensors: tensors.pop(scale))
    assert scale in refused(tmp_path, target)


@pytest.mark.parametrize("architecture", LIVELY)
def test_roundtrip_with_a_trimmed_vocabulary(target, tmp_path, architecture):
    head = tiny_head(target, architecture=architecture, draft_vocab_size=10)
    head.draft_vocab.copy_(torch.arange(10) * 6)
    save_head(head, tmp_path, target=target.name, dtype=torch.bfloat16, meta={})
    assert load_head(tmp_path, target).draft_vocab.tolist() == [i * 6 for i in range(10)]


def test_loaded_head_takes_the_targets_dtype(folder):
    assert load_head(folder, tiny_target(dtype=torch.bfloat16)).q_proj.weight.dtype == torch.bfloat16


def test_another_targets_head(folder):
    assert "hidden size 32" in refused(folder, tiny_target(hidden_size=40))
    message = refused(folder, tiny_target(vocab_size=80))
    assert "vocabulary size 64" in message
    assert "beagle train" in message


def test_config_is_missing_broken_or_foreign(folder, target):
    edit_config(folder, model_type="llama")
    assert "no Beagle head" in refused(folder, target)
    (folder / "config.json").write_text("[]")
    assert "no Beagle head" in refused(folder, target)
    (folder / "config.json").write_text('{"model_type": "beag')
    assert "unreadable" in refused(folder, target)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder, target)


def test_another_architectures_name(folder, target):
    config = json.loads((folder / "config.json").read_text())
    other = next(name for name in LIVELY if name != config["model_type"])
    config["head"] = {
        key: value for key, value in config["head"].items() if key not in ("newest_state", "token_in_mlp", "blocks")
    }
    edit_config(folder, model_type=other, head=config["head"])
    assert "model.safetensors is corrupt or incomplete" in refused(folder, target)


@pytest.mark.parametrize("kind", [None, ["beagle"], {"eagle": 1}], ids=str)
def test_model_types_that_are_no_names(folder, target, kind):
    edit_config(folder, model_type=kind)
    message = refused(folder, target)
    assert "no Beagle head" in message
    assert all(name in message for name in HEADS)


@pytest.mark.parametrize("head", [{}, None, 3, [1], {"hidden_size": "32"}], ids=str)
def test_incomplete_settings(folder, target, head):
    edit_config(folder, head=head)
    assert "incomplete" in refused(folder, target)


def test_newer_settings(folder, target):
    head = json.loads((folder / "config.json").read_text())["head"]
    edit_config(folder, head=head | {"flux": 1})
    assert "flux" in refused(folder, target)


def test_settings_that_do_not_fit_the_weights(folder, target):
    head = json.loads((folder / "config.json").read_text())["head"]
    edit_config(folder, head=head | {"num_kv_heads": 2})
    assert "model.safetensors" in refused(folder, target)


@pytest.mark.parametrize("keep", [0, 5, -40])
def test_truncated_weights(folder, target, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "corrupt" in refused(folder, target)


def test_missing_weights(folder, target):
    edit_weights(folder, lambda tensors: tensors.pop("o_proj.weight"))
    assert "o_proj" in refused(folder, target) or "incomplete" in refused(folder, target)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(folder, target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, target, value):
    edit_weights(folder, lambda tensors: tensors["q_proj.weight"][0].fill_(value))
    assert "NaN or infinite" in refused(folder, target)


def test_vocabulary_beyond_the_targets(folder, target):
    edit_weights(folder, lambda tensors: tensors["draft_vocab"].add_(1))
    assert "vocabulary" in refused(folder, target)


def test_finding_heads(folder):
    assert find_head(str(folder), "any") == folder
    assert find_head("head", "smollm2-135m") == shipped_head("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert shipped_head("a-target-nobody-ships-a-head-for") is None
    with pytest.raises(BeagleError, match="beagle train"):
        find_head("head", "a-target-nobody-ships-a-head-for")
    with pytest.raises(BeagleError, match="no such folder"):
        find_head(str(folder / "none"), "any")


@pytest.mark.parametrize(
    ("target", "found"),
    [("smollm2-135m", True), ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
     ("models/SmolLM2-135M-Instruct.Q4_1.gguf", True),
     ("smollm2-135m-instruct-q4_k_m.gguf", True), ("SmolLM2-135M-Instruct-bf16.gguf", True),
     ("models/smollm2-135m-instruct/", True), ("HuggingFaceTB/SmolLM2-135M", False), ("SmolLM2-360M-Instruct", False),
     ("SmolLM2-135M-Instruct-mine.gguf", False), ("..", False), ("", False)],
)  # fmt: skip
def test_one_model_has_many_names(target, found):
    assert (shipped_head(target) is not None) == found


@pytest.mark.parametrize(("setting", "value"), [("concat", False), ("experts", 4), ("newest_state", "linear")])
def test_settings_that_are_gone_are_accepted_at_the_value_that_is_left(target, tmp_path, setting, value):
    save_head(tiny_head(target), tmp_path, target=target.name, dtype=torch.float32, meta={})
    head = json.loads((tmp_path / "config.json").read_text())["head"]
    edit_config(tmp_path, head={**head, "concat": True, "experts": 0})
    assert load_head(tmp_path, target).config.newest_state == "scale"
    edit_config(tmp_path, head={**head, setting: value})
    message = refused(tmp_path, target)
    assert setting in message
    assert repr(value) in message
