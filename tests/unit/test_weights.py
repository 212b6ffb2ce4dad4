"""Weights on their way from the trainer to the draft model: packed into buckets, unpacked, and none lost."""

from __future__ import annotations

from types import SimpleNamespace

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
    from skd_plugin.host.weight_sync import Bucket, flatten

    originals = [torch.randn(shape) for shape in ((2, 3), (4,), (), (1, 5, 2))]
    parameters = [torch.nn.Parameter(tensor) for tensor in originals]
    parameters[0] = torch.nn.Parameter(originals[0].T.contiguous().T)  # not contiguous in memory
    bucket = Bucket(list("abcd"), [tuple(t.shape) for t in originals], torch.float32)
    flat = flatten(parameters)
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
    for bucket, parameters in weight_sync.buckets(model):
        assert {p.dtype for p in parameters} == {bucket.dtype}
        num_bytes = bucket.size * torch.empty(0, dtype=bucket.dtype).element_size()
        assert len(parameters) == 1 or num_bytes <= limit
        received += bucket.unpack(weight_sync.flatten(parameters))
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
        drafter = SimpleNamespace(load_student=self.loaded.extend)
        self.extension.model_runner = SimpleNamespace(drafter=drafter)


def test_broadcast_bucket_reaches_the_draft_model() -> None:
    flat = torch.arange(10, dtype=torch.float32)
    worker = Worker(flat)
    worker.extension.receive_student(["a", "b"], [(2, 3), (4,)], torch.float32)
    assert [(name, tensor.tolist()) for name, tensor in worker.loaded] == [
        ("a", [[0, 1, 2], [3, 4, 5]]),
        ("b", [6, 7, 8, 9]),
    ]


@pytest.mark.parametrize("method", ["update_weight", "update_weight_cuda_ipc"])
def test_hosts_own_way_is_closed(method: str) -> None:
    """It would load the student's weights into the teacher."""
    worker = Worker(torch.zeros(1))
    with pytest.raises(RuntimeError, match="would overwrite the teacher"):
        getattr(worker.extension, method)("w", torch.float32, (1,))
    assert worker.loaded == []
