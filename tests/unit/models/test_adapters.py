"""Low-rank adapters: the formula, what is shared, what is published, folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from pydantic import ValidationError

from april.core.errors import ModelError
from april.models.adapters import MergedWeights, is_adapter_folder, merged_weight, read_adapter
from april.models.lora_config import LoraConfig
from april.models.policy import PackedSequences, Policy, WithoutAdapters
from april.testing.toy_model import toy_model
from april.training.config import TrainerConfig

KINDS = ["qwen3", "gemma2"]


def policy(kind: str = "qwen3", dtype: torch.dtype = torch.float64, **options: Any) -> Policy:
    module = toy_model(kind, dtype=dtype, vocab_size=17, hidden_size=16, num_heads=2, num_kv_heads=1)  # type: ignore[arg-type]
    return Policy(module, **options)


def logprobs(subject: Policy) -> torch.Tensor:
    ids = np.arange(2, 14, dtype=np.int32)
    sequences = PackedSequences.of([ids[:4], ids[2:5]], [ids[4:], ids[5:8]])
    return subject.response_logprobs(sequences, torch.full((len(sequences.rows),), 0.7)).logprobs.detach()


def moved(subject: Policy) -> Policy:
    """Adapters as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in subject.module.parameters():
            if tensor.requires_grad:
                tensor.copy_(torch.randn_like(tensor) * 0.3)
    return subject


def test_the_merged_weight_by_hand() -> None:
    base = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [0.0], [3.0]])
    expected = torch.tensor([[1.5, -0.5], [0.0, 1.0], [3.5, 0.5]])
    assert torch.equal(merged_weight(base, a, b, 0.5), expected)
    assert not torch.equal(merged_weight(base, a, b, 1.0), expected)
    assert merged_weight(base.bfloat16(), a, b, 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_are_the_base_bit_for_bit_and_share_its_memory(kind: str) -> None:
    base = policy(kind)
    subject = base.adapted(LoraConfig(rank=4))
    assert torch.equal(logprobs(base), logprobs(subject)) and subject.packed is base.packed
    before = {tensor.data_ptr() for tensor in base.module.parameters()}
    frozen = {tensor.data_ptr() for tensor in subject.module.parameters() if not tensor.requires_grad}
    assert frozen == before
    assert all(tensor.requires_grad for tensor in base.module.parameters()), "the base itself is left as it was"
    trained = [name for name, tensor in subject.module.named_parameters() if tensor.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name for name in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_merges_to_what_is_trained(kind: str) -> None:
    base = policy(kind)
    subject = moved(base.adapted(LoraConfig(rank=3, alpha=12)))
    published = subject.weights()
    assert len(published) == 3 * 7 * 2
    assert published["model.layers.1.mlp.up_proj.lora_A.weight"].shape == (3, 16)
    assert float(published["model.layers.1.mlp.up_proj.lora_scaling"]) == 4.0
    merged = MergedWeights(base.weights(), published)
    assert list(merged) == list(base.weights()) and len(merged) == len(base.weights())
    assert "lm_head.weight" in merged and "model.layers.1.mlp.up_proj.lora_A.weight" not in merged
    whole = policy(kind)
    whole.module.load_state_dict(dict(merged))
    assert float((logprobs(whole) - logprobs(subject)).abs().max()) < 1e-6
    assert float((logprobs(base) - logprobs(subject)).abs().max()) > 0.1


def test_without_its_adapters_a_policy_is_the_base() -> None:
    base = policy()
    subject = moved(base.adapted(LoraConfig(rank=2)))
    trained = logprobs(subject)
    assert torch.equal(logprobs(WithoutAdapters(subject)), logprobs(base))
    assert torch.equal(logprobs(subject), trained) and not torch.equal(trained, logprobs(base))


def test_a_copy_has_adapters_of_its_own_on_the_same_base() -> None:
    subject = moved(policy().adapted(LoraConfig(rank=2)))
    copied = subject.copy()
    assert torch.equal(logprobs(copied), logprobs(subject))
    before = logprobs(subject)
    with torch.no_grad():
        for tensor in copied.state().values():
            tensor.add_(1.0)
    assert torch.equal(logprobs(subject), before) and not torch.equal(logprobs(copied), before)
    bases = [{t.data_ptr() for t in one.module.parameters() if not t.requires_grad} for one in (subject, copied)]
    assert bases[0] == bases[1]


def test_the_first_adapters_are_those_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = policy().adapted(LoraConfig(rank=2)).weights()
    state = torch.random.get_rng_state()
    two = policy().adapted(LoraConfig(rank=2)).weights()
    other = policy().adapted(LoraConfig(rank=2, seed=1)).weights()
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name])
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers of others are left alone"


def test_only_the_named_layers_get_adapters() -> None:
    published = policy().adapted(LoraConfig(rank=2, targets=("v_proj", "layers.1.mlp.up_proj"))).weights()
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in published})
    expected = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
    assert layers == expected


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens"])
def test_a_layer_that_gets_no_adapter_is_refused_with_the_nearest(target: str) -> None:
    with pytest.raises(ModelError, match="no linear layer has this name") as error:
        policy().adapted(LoraConfig(targets=("v_proj", target)))
    text = str(error.value)
    assert f"got:      {target}" in text and "training.lora.targets" in text and "not the output layer" in text
    assert ("did you mean 'q_proj'?" in text) is (target == "q_porj")


def test_adapters_on_adapters_are_refused() -> None:
    with pytest.raises(ModelError, match="no further ones"):
        policy().adapted(LoraConfig()).adapted(LoraConfig())


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}, {"dropout": 1.0}, {"ranks": 4}])
def test_options_without_sense_are_refused(options: dict[str, Any]) -> None:
    assert TrainerConfig.model_validate({"lora": {"targets": "q_proj"}}).lora == LoraConfig(targets=("q_proj",))
    assert TrainerConfig.model_validate({"lora": True}).lora == LoraConfig()
    assert TrainerConfig.model_validate({"lora": False}).lora is None is TrainerConfig().lora
    with pytest.raises(ValidationError):
        TrainerConfig.model_validate({"lora": options})


def test_adapters_of_another_model_are_refused() -> None:
    published = policy().adapted(LoraConfig(rank=2)).weights()
    with pytest.raises(ModelError, match="a layer that the base lacks"):
        MergedWeights({"model.embed_tokens.weight": torch.zeros(2)}, published)


def test_adapters_of_another_shape_or_without_a_part_are_refused() -> None:
    base = dict(policy().module.named_parameters())
    published = policy().adapted(LoraConfig(rank=2)).weights()
    MergedWeights(base, published)
    wide, half = dict(published), dict(published)
    name = next(name for name in published if name.endswith(".lora_A.weight"))
    wide[name] = torch.zeros(2, published[name].shape[1] + 1)
    with pytest.raises(ModelError, match="of a layer of another shape"):
        MergedWeights(base, wide)
    del half[name.replace("lora_A.weight", "lora_scaling")]
    with pytest.raises(ModelError, match="an adapter is not whole"):
        MergedWeights(base, half)


def test_adapters_of_another_rank_are_refused() -> None:
    state = policy().adapted(LoraConfig(rank=2)).state()
    with pytest.raises(RuntimeError, match="size mismatch"):
        policy().adapted(LoraConfig(rank=3)).load_state(state)
    with pytest.raises(RuntimeError, match="unknown tensor"):
        policy().load_state(state)
    with pytest.raises(RuntimeError, match="missing tensor"):
        policy().adapted(LoraConfig(rank=2)).load_state({})


@pytest.mark.parametrize("targets", ["all", ("q_proj", "down_proj")])
def test_a_folder_is_read_by_peft_and_by_april(tmp_path: Path, targets: Any) -> None:
    from transformers import AutoModelForCausalLM

    policy(dtype=torch.float32).save(tmp_path / "base")
    base = Policy.load(tmp_path / "base")
    subject = moved(base.adapted(LoraConfig(rank=2, alpha=3, targets=targets)))
    subject.save(tmp_path / "adapter")
    assert is_adapter_folder(tmp_path / "adapter") and not is_adapter_folder(tmp_path / "base")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload()
    ours = Policy.load(tmp_path / "adapter")
    assert ours.adapters is None and ours.packed
    assert torch.allclose(logprobs(Policy(theirs)), logprobs(subject), atol=1e-5)
    assert torch.allclose(logprobs(ours), logprobs(subject), atol=1e-5)
    assert not torch.allclose(logprobs(base), logprobs(subject), atol=1e-2)


def test_adapters_on_merged_adapters_name_them_as_their_base(tmp_path: Path) -> None:
    policy(dtype=torch.float32).save(tmp_path / "base")
    moved(Policy.load(tmp_path / "base").adapted(LoraConfig(rank=2))).save(tmp_path / "first")
    second = moved(Policy.load(tmp_path / "first").adapted(LoraConfig(rank=3)))
    second.save(tmp_path / "second")
    assert read_adapter(tmp_path / "second")[0] == str(tmp_path / "first")
    assert torch.allclose(logprobs(Policy.load(tmp_path / "second")), logprobs(second), atol=1e-5)
    assert not torch.allclose(logprobs(Policy.load(tmp_path / "first")), logprobs(second), atol=1e-2)


def test_folders_that_april_cannot_merge_are_refused(tmp_path: Path) -> None:
    policy(dtype=torch.float32).save(tmp_path / "base")
    Policy.load(tmp_path / "base").adapted(LoraConfig(rank=2)).save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    options = json.loads(file.read_text())
    assert read_adapter(tmp_path / "adapter")[0] == str(tmp_path / "base")
    file.write_text(json.dumps(options | {"use_dora": True}))
    with pytest.raises(ModelError, match="of this kind") as error:
        Policy.load(tmp_path / "adapter")
    assert "use_dora" in str(error.value)
    file.write_text(json.dumps(options | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        Policy.load(tmp_path / "adapter")
    assert "gone" in str(error.value) and "base_model_name_or_path" in str(error.value)
    file.write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        Policy.load(tmp_path / "adapter")
