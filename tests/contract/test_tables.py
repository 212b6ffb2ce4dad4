"""The tables of this folder are true and complete: their rows name files of ours that use what they say, every method
that we override has a row, and so has every name that we rebind.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import skd_plugin
from skd_plugin.config.host_options import HOST_MODULE
from skd_plugin.engine.vocabulary import VLLM_CHECK
from tests.contract import test_openrlhf, test_vllm
from tests.contract.source import imports_inside, tree_of
from tests.contract.test_openrlhf import ACTOR, ASYNC, CRITIC, ENGINE, LAUNCHER, PPO, SAMPLES, WRAP, find
from tests.contract.test_vllm import DRAFTER, PREFIX_CACHE

PACKAGE = Path(skd_plugin.__file__).parent
HOSTS = ("openrlhf", "vllm", "deepspeed")
TABLES = (test_openrlhf, test_vllm)
WITH_TRITON = (
    "skd_plugin.engine.triton_kernels",
    "skd_plugin.engine.triton_rows",
)  # not installed here; they know neither host

STRATEGY = "openrlhf.utils.deepspeed.deepspeed"
REBOUND = [  # what we put something else in place of, where it is looked up, our file
    ("torch.cuda:current_device", f"{LAUNCHER}:RewardModelActor", "cpu.py"),
    ("torch.cuda:set_device", f"{STRATEGY}:DeepspeedStrategy.setup_distributed", "cpu.py"),
    ("torch.cuda:synchronize", f"{LAUNCHER}:BaseModelActor", "cpu.py"),
    ("torch.cuda:empty_cache", f"{LAUNCHER}:BaseModelActor", "cpu.py"),
    ("torch.cuda:current_stream", f"{WRAP}.update_weight", "cpu.py"),
    ("torch.distributed.device_mesh:init_device_mesh", STRATEGY, "cpu.py"),
    ("openrlhf.trainer.ppo_utils.replay_buffer:torch",
     "openrlhf.trainer.ppo_utils.replay_buffer:NaiveReplayBuffer.__init__", "host/on_cpu.py"),
    ("openrlhf.utils.utils:convert_to_torch_dtype", "openrlhf.models:Actor.__init__", "host/on_cpu.py"),
    (f"{STRATEGY}.DeepspeedStrategy:moving_average", f"{ACTOR}:ActorPPOTrainer.training_step", "host/on_cpu.py"),
    (f"{STRATEGY}:get_train_ds_config", f"{STRATEGY}:DeepspeedStrategy.get_ds_train_config", "host/on_cpu.py"),
    (f"{ACTOR}:stateless_init_process_group", f"{ACTOR}:ActorPPOTrainer._init_vllm_sync_group", "host/on_cpu.py"),
    ("openrlhf.utils.distributed_util:stateless_init_process_group", f"{WRAP}.init_process_group", "host/on_cpu.py"),
    (f"{ACTOR}:iter_grad_accum_global_norm", f"{ACTOR}:ActorPPOTrainer.ppo_train", "host/policy_actor.py"),
    ("openrlhf.utils.deepspeed.DeepspeedStrategy:backward", f"{ACTOR}:ActorPPOTrainer.training_step",
     "host/policy_actor.py"),
    ("openrlhf.utils.deepspeed.DeepspeedStrategy:optimizer_step", f"{ACTOR}:ActorPPOTrainer.training_step",
     "host/policy_actor.py"),
    (f"{ACTOR}:Actor", f"{ACTOR}:PolicyModelActor.init_model_from_pretrained", "host/policy_actor.py"),
    (f"{ACTOR}:ActorPPOTrainer", f"{ACTOR}:PolicyModelActor.init_model_from_pretrained", "host/policy_actor.py"),
    ("openrlhf.utils:get_strategy", HOST_MODULE, "host/bind.py"),
    ("ray._private.services:get_node", "ray._private.node:Node.__init__", "host/launch.py"),
    (f"{ENGINE}:RolloutRayActor", f"{ENGINE}:create_vllm_engines", "host/bind.py"),
    (f"{ENGINE}:TokensPrompt", f"{ENGINE}:RolloutRayActor.generate", "host/rollout_actor.py"),
    (f"{ACTOR}:PolicyModelActor", HOST_MODULE, "host/bind.py"),
    (CRITIC, HOST_MODULE, "host/bind.py"),
    ("openrlhf.trainer.ray.ppo_critic:CriticPPOTrainer", f"{CRITIC}.init_model_from_pretrained", "host/critic.py"),
    ("deepspeed.runtime.zero.partition_parameters:dist", "deepspeed.runtime.zero.partition_parameters:Init",
     "host/on_cpu.py"),
    (f"{PPO}:PPOTrainer", HOST_MODULE, "host/bind.py"),
    (f"{ASYNC}:PPOTrainerAsync", HOST_MODULE, "host/bind.py"),
    (f"{ASYNC}:GenerateSamplesActor", f"{ASYNC}:PPOTrainerAsync.__init__", "host/async_controller.py"),
    (f"{ASYNC}:TrainingActor", f"{ASYNC}:PPOTrainerAsync.__init__", "host/async_controller.py"),
    (f"{ASYNC}:SamplesGenerator", f"{ASYNC}:GenerateSamplesActor.__init__", "host/async_controller.py"),
    (f"{PPO}:SamplesGenerator", f"{PPO}:PPOTrainer.__init__", "host/controller.py"),
    (f"{PPO}:PromptDataset", f"{PPO}:prepare_datasets", "host/controller.py"),
    ("openrlhf.trainer.ppo_utils.samples_generator:tqdm", f"{SAMPLES}._generate_vllm", "host/controller.py"),
    ("openrlhf.datasets.prompts_dataset:_str_to_content_list", "openrlhf.datasets.prompts_dataset:preprocess_data",
     "host/prompts.py"),
    ("transformers.dynamic_module_utils:get_class_in_module",
     "transformers.dynamic_module_utils:get_class_from_dynamic_module", "trust.py"),
    (f"{LAUNCHER}:ReferenceModelActor", HOST_MODULE, "host/bind.py"),
    (f"{LAUNCHER}:RewardModelActor", HOST_MODULE, "host/bind.py"),
    ("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
     "vllm.model_executor.layers.linear:UnquantizedLinearMethod.process_weights_after_loading", "engine/drafter.py"),
    (f"{PREFIX_CACHE}:generate_block_hash_extra_keys", f"{PREFIX_CACHE}:get_request_block_hasher",
     "engine/prefix_cache.py"),
    ("vllm.v1.engine.output_processor:IncrementalDetokenizer",
     "vllm.v1.engine.output_processor:RequestState.from_new_request", "engine/set_up.py"),
    (f"vllm.config.SpeculativeConfig:{VLLM_CHECK}", "vllm.config:SpeculativeConfig", "engine/vocabulary.py"),
    ("vllm.v1.engine.output_processor:IncrementalDetokenizer",
     "vllm.v1.engine.output_processor:RequestState.from_new_request", "engine/set_up.py"),
    (f"vllm.config.SpeculativeConfig:{VLLM_CHECK}", DRAFTER, "engine/vocabulary.py"),
]  # fmt: skip


def _rows() -> Iterator[tuple[str, str, str]]:
    """What a row is about, the word that stands for it, our file."""
    functions = [(path, ours) for table in TABLES for path, *_, ours in table.SIGNATURES]
    functions += [(path, ours) for table in TABLES for path, _, ours, _ in table.HASHES]
    fields = [(paths[0], names, ours) for paths, names, ours in test_openrlhf.ATTRIBUTES] + test_vllm.FIELDS
    rows = [(path, _word(path), ours) for path, ours in (*functions, *((path, ours) for path, _, ours in REBOUND))]
    rows += [(f"{path}, {name}", name, ours) for path, names, ours in fields for name in names.split()]
    return ((about, word, file) for about, word, ours in rows for file in ours.split(" and "))


def _word(path: str) -> str:
    """The last name of a path; a class stands for its __init__."""
    return re.split("[.:]", path.removesuffix(".__init__"))[-1]


@pytest.mark.parametrize("ours", sorted({file for *_, file in _rows()}))
def test_rows_name_a_file_that_knows_what_they_are_about(ours: str) -> None:
    """It calls, overrides or replaces it, or a comment there says what is assumed of it."""
    file = PACKAGE / ours
    assert file.is_file(), f"there is no skd_plugin/{ours}"
    known = set(re.findall(r"\w+", file.read_text()))
    known |= {base.__name__ for own in _classes() if own.__name__ in known for base in _host_bases(own)}
    wrong = [path for path, word, where in _rows() if where == ours and word not in known]
    assert not wrong, f"skd_plugin/{ours} has nothing of {', '.join(wrong)}; name another file, or take the row out"


# --- what we override ---


def _classes() -> list[type]:
    """Ours that are made from a class of a host; those inside of functions are made here."""
    found = {}
    for module in _modules():
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__ and any(_host_bases(value)):
                found[f"{module.__name__}:{value.__qualname__}"] = value
    launcher, bind = map(importlib.import_module, (LAUNCHER, "skd_plugin.host.bind"))
    made = [bind._frozen(actor) for actor in (launcher.ReferenceModelActor, launcher.RewardModelActor)]
    return [*found.values(), *made]


def _modules() -> Iterator[ModuleType]:
    for part in ("host", "engine"):
        package = importlib.import_module(f"skd_plugin.{part}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name not in WITH_TRITON:
                yield importlib.import_module(module.name)


def _host_bases(ours: type) -> Iterator[type]:
    return (base for base in ours.__mro__ if base.__module__.split(".")[0] in HOSTS)


def _overridden(ours: type) -> Iterator[tuple[str, Any]]:
    """`Class.name` of the host and what stands there, for each name of ours that takes the place of one."""
    for name, value in vars(ours).items():
        if not (inspect.isroutine(value) or isinstance(value, property)):
            continue
        for base in _host_bases(ours):
            if name in vars(base):
                yield f"{base.__module__}:{base.__qualname__}.{name}", getattr(base, name)
                break


def test_every_method_that_we_override_has_a_row() -> None:
    rows = {id(_plain(find(path))) for table in TABLES for path, *_ in table.SIGNATURES}
    classes = _classes()
    assert len(classes) > 12, "where are our classes?"
    missing = {path for ours in classes for path, method in _overridden(ours) if id(_plain(method)) not in rows}
    assert not missing, f"add to SIGNATURES: {sorted(missing)}"


def _plain(method: Any) -> Any:
    return getattr(method, "__func__", method)


def test_classes_inside_of_functions_are_known() -> None:
    """Those that `_classes` cannot find; ConfiguredRollout has SKDRollout's methods."""
    inside = set()
    for part in ("host", "engine"):
        for file in (PACKAGE / part).rglob("*.py"):
            functions = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
            inside |= {n.name for f in functions for n in ast.walk(f) if isinstance(n, ast.ClassDef)}
    assert inside == {"ConfiguredRollout", "Frozen"}, "see _classes in this file"


# --- what we rebind ---


def _rebound(file: Path) -> Iterator[str]:
    """`owner:name` of each call of `rebind` in a file, loops and constants resolved."""
    tree = ast.parse(file.read_text())
    names = _imported(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "rebind"):
        owner, name = call.args[:2]
        root, *rest = ast.unparse(owner).split(".")
        path = ".".join([names.get(root, root), *rest])
        yield from (f"{path}:{value}" for value in _values(name, tree, file))


def _imported(tree: ast.Module) -> dict[str, str]:
    """What each imported name of a file means, and each `name = dotted.name`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Attribute)
        ):
            names[node.target.id] = ast.unparse(node.value)
    return names


def _values(name: ast.expr, tree: ast.Module, file: Path) -> list[str]:
    if isinstance(name, ast.Constant):
        return [name.value]
    for loop in (node for node in ast.walk(tree) if isinstance(node, ast.For)):
        if ast.unparse(loop.target) == ast.unparse(name):
            return list(ast.literal_eval(loop.iter))
    module = importlib.import_module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
    return [getattr(module, ast.unparse(name))]


def test_every_name_that_we_rebind_has_a_row() -> None:
    rows = {(path, ours) for path, _, ours in REBOUND}
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "seams.py"]
    found = {(path, file.relative_to(PACKAGE).as_posix()) for file in files for path in _rebound(file)}
    assert rows == found, f"add to REBOUND: {sorted(found - rows)}; take out: {sorted(rows - found)}"


@pytest.mark.parametrize(("path", "caller", "ours"), REBOUND, ids=[row[0] for row in REBOUND])
def test_a_rebound_name_is_looked_up_when_it_is_used(path: str, caller: str, ours: str) -> None:
    """A `from owner import name` at the top of another module would have taken the host's own long before."""
    owner, _, name = path.partition(":")
    assert _looks_up(find(caller), owner, name), f"{caller} no longer looks {path} up; revisit skd_plugin/{ours}"


def _looks_up(caller: Any, owner: str, name: str) -> bool:
    if (owner, name) in imports_inside(caller):  # when it is called; the script itself is run after us
        return True
    for node in ast.walk(tree_of(caller)):
        if isinstance(node, ast.Attribute) and node.attr == name:  # of a module or an object
            return True
        if isinstance(node, ast.Name) and node.id == name:  # of its own module
            return caller.__module__ == owner
    return False
