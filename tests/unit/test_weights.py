"""Weights on their way from the trainer to the draft model: packed into buckets, unpacked, and none lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def importable_host() -> None:
    from skd_plugin.host import on_cpu

    on_cpu.install()


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    parts = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False).to(torch.bfloat16), torch.nn.LayerNorm(5)]
    return torch.nn.Sequential(*parts, torch.nn.Linear(1, 1))


def test_unpacked_weights_are_the_packed_ones() -> None:
    from skd_plugin.adapters import Weight
    from skd_plugin.host.weight_sync import Bucket, flatten

    originals = [torch.randn(shape) for shape in ((2, 3), (4,), (), (1, 5, 2))]
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in zip("abcd", originals, strict=True)}
    parameters["a"] = torch.nn.Parameter(originals[0].T.contiguous().T)  # not contiguous in memory
    bucket = Bucket(list("abcd"), [tuple(t.shape) for t in originals], torch.float32)
    flat = flatten(torch.nn.Module(), {name: Weight(parameter, None) for name, parameter in parameters.items()})
    assert flat.shape == (bucket.size,) == (6 + 4 + 1 + 10,)
    unpacked = bucket.unpack(flat)
    assert [name for name, _ in unpacked] == list("abcd")
    for (_, found), wanted in zip(unpacked, originals, strict=True):
        assert torch.equal(found, wanted)


def test_names_and_shapes_must_match() -> None:
    from skd_plugin.host.weight_sync import Bucket

    with pytest.raises(ValueError):
        Bucket(["a"], [(2,), (2,)], torch.float32).unpack(torch.zeros(4))
    with pytest.raises(RuntimeError):
        Bucket(["a"], [(3,)], torch.float32).unpack(torch.zeros(4))


@pytest.mark.parametrize("limit", [1, 40, 60, 1 << 20])
def test_buckets_hold_every_parameter_once(model, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model's order, of one dtype each, and within the limit unless a parameter alone exceeds it."""
    from skd_plugin.host import weight_sync

    monkeypatch.setattr(weight_sync, "BUCKET_BYTES", limit)
    received = []
    for bucket, weights in weight_sync.buckets(model):
        assert {weight.base.dtype for weight in weights.values()} == {bucket.dtype}
        num_bytes = bucket.size * torch.empty(0, dtype=bucket.dtype).element_size()
        assert len(weights) == 1 or num_bytes <= limit
        received += bucket.unpack(weight_sync.flatten(model, weights))
    expected = list(model.named_parameters())
    assert [name for name, _ in received] == [name for name, _ in expected]
    for (name, found), (_, wanted) in zip(received, expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name


def test_a_bucket_is_filled_up_to_the_limit(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the parameters in turn: 48, 16, 16 (of another dtype), 20, 20, 4, 4."""
    from skd_plugin.host import weight_sync

    monkeypatch.setattr(weight_sync, "BUCKET_BYTES", 40)
    sizes = [len(bucket.names) for bucket, _ in weight_sync.buckets(model)]
    assert sizes == [1, 1, 1, 2, 2]


def test_a_large_limit_makes_one_bucket_a_run_of_dtypes(model) -> None:
    from skd_plugin.host.weight_sync import buckets

    names = [bucket.names for bucket, _ in buckets(model)]
    assert names == [["0.weight", "0.bias"], ["1.weight"], ["2.weight", "2.bias", "3.weight", "3.bias"]]


def test_sharded_parameter_has_its_whole_shape(model: torch.nn.Module) -> None:
    """Under ZeRO-3 a parameter is an empty shard outside GatheredParameters; its shape is beside it."""
    from skd_plugin.host.weight_sync import buckets

    shard = torch.nn.Parameter(torch.empty(0))
    shard.ds_shape = torch.Size((6, 7))
    model = torch.nn.Module()
    model.register_parameter("w", shard)
    assert [bucket.shapes for bucket, _ in buckets(model)] == [[(6, 7)]]


class Worker:
    """What StudentWeights finds around it in vLLM's worker; `group` plays the trainer's broadcast."""

    def __init__(self, flat: torch.Tensor) -> None:
        from skd_plugin.host.weight_sync import StudentWeights

        self.extension = StudentWeights()
        self.loaded: list[tuple[str, torch.Tensor]] = []
        self.extension.device = torch.device("cpu")
        self.extension._model_update_with_ray = False
        self.extension._model_update_group = SimpleNamespace(
            broadcast=lambda tensor, src, stream: tensor.copy_(flat if src == 0 else torch.zeros_like(flat))
        )
        self.of_teacher: list[tuple[str, torch.Tensor]] = []
        self.extension.load_student, self.extension.load_teacher = self.loaded.extend, self.of_teacher.extend


def test_broadcast_bucket_reaches_the_draft_model() -> None:
    flat = torch.arange(10, dtype=torch.float32)
    worker = Worker(flat)
    worker.extension.receive_student(["a", "b"], [(2, 3), (4,)], torch.float32)
    assert [(name, tensor.tolist()) for name, tensor in worker.loaded] == [
        ("a", [[0, 1, 2], [3, 4, 5]]),
        ("b", [6, 7, 8, 9]),
    ]
    assert not worker.of_teacher
    worker.extension.receive_student(["a"], [(10,)], torch.float32, into_teacher=True)
    assert [name for name, _ in worker.of_teacher] == ["a"] and len(worker.loaded) == 2


@pytest.mark.parametrize("method", ["update_weight", "update_weight_cuda_ipc"])
def test_hosts_own_way_is_closed(method: str) -> None:
    """It would load the student's weights into the teacher."""
    worker = Worker(torch.zeros(1))
    with pytest.raises(RuntimeError, match="would overwrite the teacher"):
        getattr(worker.extension, method)("w", torch.float32, (1,))
    assert worker.loaded == []


SHAPE = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def families() -> dict[str, Any]:
    from transformers import GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

    heads = SHAPE | {"num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**heads, tie_word_embeddings=True),
        "gpt_neox": GPTNeoXConfig(**SHAPE),
        "mixtral": MixtralConfig(**heads, num_local_experts=4),
        "qwen3_moe": Qwen3MoeConfig(**heads, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    }


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("limit", [1, 1 << 14, 1 << 20])
def test_weights_travel_as_they_are_in_a_checkpoint(family: str, limit: int, tmp_path, monkeypatch) -> None:
    """Names, parts and values of what transformers saves, whatever they are called in memory."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from skd_plugin.host import weight_sync

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(families()[family]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(weight_sync, "BUCKET_BYTES", limit)
    received = {}
    for bucket, weights in weight_sync.buckets(model):
        received |= dict(bucket.unpack(weight_sync.flatten(model, weights)))
    saved = load_file(tmp_path / "model.safetensors")
    assert received.keys() == saved.keys()
    assert all(torch.equal(received[name], saved[name]) for name in saved)
