"""A tiny pair of random models, the engine on it, and a slow independent reference of both."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

# As in an active environment: with another ninja than the last time DeepSpeed builds its extension anew.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
# Here and in every process that a test starts: the tensors are tiny, and threads that wait for each other turn round.
os.environ["OMP_NUM_THREADS"] = "1"
# On a GPU: Triton's products of float32 keep all its bits, where they would round to TF32's ten.
os.environ["TRITON_F32_DEFAULT"] = "ieee"
# Nobody asks the Hub, which would be half a minute of attempts without a network; datasets are kept for the session.
os.environ["HF_HUB_OFFLINE"] = "1"
DATASETS = TemporaryDirectory(prefix="skd-datasets-")
os.environ["HF_DATASETS_CACHE"] = DATASETS.name
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Soak tests run only where `-m` or an argument names them, whatever else `-m` says."""
    left_out = [item for item in items if item.get_closest_marker("soak") and not _is_named(item, config)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_named(item: pytest.Item, config: pytest.Config) -> bool:
    return "soak" in config.option.markexpr or any(item.name in argument for argument in config.args)


VOCAB = 32
EOS = 2
MAX_LEN = 96
LOSS_TEMPERATURE = 2.0  # of the engine under test: it has no part in sampling, only in what is recorded

Logits = Callable[[str, Sequence[Sequence[int]]], list[torch.Tensor]]


def _make_model(hidden: int, layers: int, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        initializer_range=0.3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).to(torch.float32)


def _make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz +="])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `teacher` and `student`: random Llamas with 32 tokens, and distributions far from uniform."""
    folder = tmp_path_factory.mktemp("tiny_pair")
    tokenizer = _make_tokenizer()
    assert len(tokenizer) == VOCAB
    for name, hidden, layers, seed in (("teacher", 64, 2, 1), ("student", 32, 1, 2)):
        _make_model(hidden, layers, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


TEACHERS_END = 7  # of `two_ends`


@pytest.fixture(scope="session")
def two_ends(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair with a teacher that ends its turn with another token, "e", or with the student's."""
    from transformers import AutoTokenizer, GenerationConfig

    folder = tmp_path_factory.mktemp("two_ends") / "pair"
    shutil.copytree(tiny_pair, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(TEACHERS_END)
    tokenizer.save_pretrained(folder / "teacher")
    GenerationConfig(eos_token_id=[TEACHERS_END, EOS]).save_pretrained(folder / "teacher")
    return folder


PADDED_VOCAB = 48


def _padded(model):
    """The same model with output rows for no token, whose logits are far above all others."""
    config = type(model.config)(**{**model.config.to_dict(), "vocab_size": PADDED_VOCAB})
    padded = type(model)(config).to(torch.float32)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = state[name].mean(0) + 3 * torch.randn(PADDED_VOCAB - VOCAB, state[name].shape[1])
        state[name] = torch.cat([state[name], extra])
    padded.load_state_dict(state)
    return padded


@pytest.fixture(scope="session")
def padded_pairs(tiny_pair: Path, hf_models: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pair with 16 more output rows in one of the models, by the name of that model."""
    folders = {}
    for name in ("teacher", "student"):
        folders[name] = tmp_path_factory.mktemp(f"padded_{name}") / "pair"
        shutil.copytree(tiny_pair, folders[name])
        torch.manual_seed(3)
        _padded(hf_models[name]).save_pretrained(folders[name] / name)
    return folders


@pytest.fixture(scope="session")
def engine(tiny_pair: Path):
    """`engine(draft_len, pair, **others)`: the real engine on the tiny pair or another one, started once a session for
    each setting.
    """
    engines = {}

    def get(draft_len: int, pair: Path = tiny_pair, *, teacher_hidden: bool = False, kernels: str = "auto", **others):
        key = (draft_len, pair, teacher_hidden, kernels, *sorted(others.items()))
        if key not in engines:
            from skd_plugin.engine.offline import SKDEngine
            from tests.specs import make_spec

            defaults = dict(
                max_num_seqs=128,
                max_num_batched_tokens=1024,  # holds the drafts of every sequence, but not all prompts at once
                kv_cache_memory_bytes=64 << 20,
                block_size=32,
            )
            spec = make_spec(
                teacher=str(pair / "teacher"),
                student=str(pair / "student"),
                draft_len=draft_len,
                max_len=MAX_LEN,
                teacher_top_k=8,
                student_top_k=3,
                loss_temperature=LOSS_TEMPERATURE,
                teacher_hidden=teacher_hidden,
                kernels=kernels,
                joins_ends=True,  # as a recipe does; what differs is for a pair that ends in two ways
                options=defaults | others,
            )
            engines[key] = SKDEngine(spec)
        if engines[key]._llm.llm_engine.has_unfinished_requests():
            pytest.fail("an earlier test left this engine in the middle of a batch; its failure is the one to look at")
        return engines[key]

    return get


@pytest.fixture(scope="session")
def hf_models(tiny_pair: Path) -> dict:
    """Both models in transformers."""
    from transformers import AutoModelForCausalLM

    return {
        name: AutoModelForCausalLM.from_pretrained(tiny_pair / name, dtype=torch.float32).eval()
        for name in ("teacher", "student")
    }


@pytest.fixture(scope="session")
def reference_logits(hf_models: dict) -> Logits:
    """`reference_logits(name, sequences)`: float64 [len(sequence), V] each; row t is what follows token t."""

    @torch.no_grad()
    def logits(name: str, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
        rows = torch.cat(
            [hf_models[name](chunk).logits for chunk in ids.split(512)]
        )  # causal: the padding comes after
        return [row[: len(sequence)].double() for row, sequence in zip(rows, sequences, strict=True)]

    return logits
