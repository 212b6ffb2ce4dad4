"""A whole engine whose logits Triton's kernels read."""

from __future__ import annotations

import pytest
import torch

from skd_plugin.core.trace import Trace
from tests.rules import make_rule

pytestmark = pytest.mark.engine


def test_same_tokens_and_traces_as_with_torch(engine) -> None:
    prompts = [torch.arange(3, 3 + length).tolist() for length in (2, 5, 9, 20)]
    drawn = []
    for kernels, name in (("torch", "LogitRows"), ("triton", "TritonRows")):
        running = engine(3, kernels=kernels)
        assert running.description["kernels"] == name
        samples = running.generate(prompts, make_rule(top_k=4), 12, seed=7)
        drawn.append(Trace.join([sample.trace for sample in samples]))
    torch_s, triton_s = drawn
    assert 0 < (torch_s.source == 0).float().mean() < 1
    for name, values in vars(torch_s).items():
        torch.testing.assert_close(getattr(triton_s, name), values, atol=1e-5, rtol=1e-5, msg=name)
