"""Every name, signature and habit of vLLM 0.29.0 that the plugin leans on. A failure names our file to revisit."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.contract.source import assert_parameters, assert_unchanged, attributes_set, imports_inside, tree_of
from tests.requests import make_request
from tests.specs import make_spec

HOST = "vLLM 0.29.0"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
DRAFTER = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
PREFIX_CACHE = "vllm.v1.core.kv_cache_utils"
DETOKENIZER = "vllm.v1.engine.detokenizer:IncrementalDetokenizer"


def find(path: str) -> Any:
    """`package.module:Name.attribute`; a property stands for its getter."""
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found.fget if isinstance(found, property) else found


HASHES = [  # vLLM code, hash, our file, what we assume of it
    (f"{RUNNER}._sample", "df64e9c9f60e", "engine/sampler.py", "SKDSampler takes its place"),
    (f"{RUNNER}.sample_tokens", "77bc8810ced5", "engine/sampler.py",
     "every token of the engine goes through one call of self._sample, before the drafter proposes"),
    (f"{RUNNER}._bookkeeping_sync", "8996e31d2657", "engine/sampler.py",
     "it drops the -1 entries and the discarded rows of what the sampler returns"),
    (f"{RUNNER}._prepare_input_ids", "78e88c9bebd1", "engine/unread_drafts.py",
     "where nothing was kept on the device it copies the host's inputs, into which ours then writes the drafts"),
    (f"{RUNNER}._get_draft_token_ids_cpu", "ba5ab5706e8f", "engine/unread_drafts.py", "it waits for the drafts"),
    (f"{SCHEDULER}.update_draft_token_ids", "b70aecf28692", "engine/unread_drafts.py",
     "it keeps what it is told, and looks at it for structured outputs alone"),
    (f"{RUNNER}._calc_spec_decode_metadata", "4e97ff3297ee", "engine/sampler.py",
     "its indices pick the teacher's logits"),
    (f"{RUNNER}.propose_draft_token_ids", "5a5d20a973b9", "engine/drafter.py",
     "it calls the drafter for every request of the batch, with their lengths before rejected drafts are taken off"),
    (f"{DRAFTER}.propose", "f1fb06572b09", "engine/drafter.py",
     "it calls _sample_draft_tokens once a drafted token, positions rising by one"),
    (f"{DRAFTER}._sample_draft_tokens", "dd85f7c5bd19", "engine/drafter.py", "SKDDrafter takes its place"),
    (f"{DRAFTER}.set_inputs_first_pass", "ff73a43504da", "engine/drafter.py",
     "the draft model reads up to the token that was just sampled, which follows the accepted ones; rejected ones "
     "come last, with the slot -1 and in seq_lens; every other token has the position that follows the one before"),
    (f"{DRAFTER}._update_positions_dependent_metadata", "ea12bbea49c9", "engine/drafter.py",
     "the slots of the drafts follow from the positions and the block table that it is given"),
    (f"{PREFIX_CACHE}:get_request_block_hasher", "c68a00ef9328", "engine/prefix_cache.py",
     "the hash of a block is of its tokens, of generate_block_hash_extra_keys, and of all blocks before it"),
    (f"{DRAFTER}.prepare_inputs_padded", "b249e3b7994b", "engine/drafter.py",
     "the lengths that it hands on still count the rejected drafts"),
    (f"{DRAFTER}.load_model", "b2bb9269f722", "engine/drafter.py", "it loads the student through _get_model"),
    (f"{DRAFTER}._get_model", "c762a5056472", "engine/drafter.py", "loadable_weights is around it"),
    (f"{SCHEDULER}.update_from_output", "2131fa06b955", "engine/sampler.py",
     "a fully kept block without its bonus token must look as if its last draft had been rejected and replaced"),
    (f"{SCHEDULER}.schedule", "08b9bad38a6e", "engine/scheduler.py",
     "_reserve_prefill_lookahead has the last word on a running request's tokens, of which 0 leave it and its drafts "
     "as they are; what is preempted is given to _preempt_request"),
    (f"{SCHEDULER}._update_request_with_output", "df4c3412bdea", "engine/scheduler.py",
     "it cuts an ended response in the list that it is given, so that what is measured behind it has stayed"),
    (f"{SCHEDULER}._preempt_request", "f1ef8455d735", "engine/scheduler.py",
     "a preempted request starts anew with all its tokens, of which SKDScheduler takes the last"),
    (f"{RUNNER}._update_states", "c786bc6ce41a", "engine/scheduler.py",
     "the runner's copy of a resumed request forgets output tokens that the scheduler's has not"),
    ("vllm.v1.sample.rejection_sampler:RejectionSampler.parse_output", "603506658606", "engine/sampler.py",
     "it turns rows with -1 into token lists"),
    ("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", "75c331c7ca81", "engine/drafter.py",
     "loadable_weights puts its own in place, which must set whatever the layers call"),
    ("vllm.v1.engine.core:EngineCoreProc.process_output_sockets", "35b0a93499b4", "engine/set_up.py",
     "what goes wrong in it ends its thread, and not the process of the engine"),
    ("vllm.config:VllmConfig.use_v2_model_runner", "dc5e45254fad", "engine/set_up.py",
     "VLLM_USE_V2_MODEL_RUNNER=0 must choose the V1 runner"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "expected", "ours", "because"), HASHES, ids=[row[0].partition(":")[2] for row in HASHES]
)
def test_source_is_the_one_that_was_read(path: str, expected: str, ours: str, because: str) -> None:
    assert_unchanged(find(path), expected, HOST, f"skd_plugin/{ours}", because)


SIGNATURES = [
    (f"{RUNNER}._sample", "logits spec_decode_metadata", "engine/sampler.py"),
    (f"{RUNNER}._prepare_input_ids", "scheduler_output num_reqs total_num_scheduled_tokens cu_num_tokens",
     "engine/unread_drafts.py"),
    (f"{RUNNER}._bookkeeping_sync",
     "scheduler_output sampler_output logits hidden_states num_scheduled_tokens", "engine/unread_drafts.py"),
    (f"{RUNNER}._get_draft_token_ids_cpu", "", "engine/unread_drafts.py"),
    ("vllm.v1.outputs:SamplerOutput.__init__", "sampled_token_ids logprobs_tensors", "engine/unread_drafts.py"),
    (f"{DRAFTER}.__init__", "vllm_config device runner", "engine/drafter.py"),
    (f"{DRAFTER}._create_draft_vllm_config", "", "engine/drafter.py"),
    (f"{DRAFTER}._get_model", "", "engine/drafter.py"),
    (f"{DRAFTER}._sample_draft_tokens", "hidden_states sampling_metadata", "engine/drafter.py"),
    (f"{DRAFTER}.propose",
     "num_speculative_tokens target_token_ids target_positions target_hidden_states next_token_ids "
     "token_indices_to_sample common_attn_metadata sampling_metadata mm_embed_inputs num_rejected_tokens_gpu "
     "slot_mappings", "engine/drafter.py"),
    (f"{DRAFTER}.set_inputs_first_pass",
     "target_token_ids next_token_ids target_positions target_hidden_states token_indices_to_sample cad "
     "num_rejected_tokens_gpu", "engine/drafter.py"),
    (f"{DRAFTER}._update_positions_dependent_metadata",
     "positions common_attn_metadata batch_size input_batch_size block_size", "engine/drafter.py"),
    (f"{PREFIX_CACHE}:generate_block_hash_extra_keys", "request start_token_idx end_token_idx start_mm_idx",
     "engine/prefix_cache.py"),
    (f"{SCHEDULER}.__init__",
     "vllm_config kv_cache_config structured_output_manager block_size hash_block_size mm_registry "
     "include_finished_set log_stats", "engine/scheduler.py"),
    (f"{SCHEDULER}.schedule", "throttle_prefills", "engine/scheduler.py"),
    (f"{SCHEDULER}.update_from_output", "scheduler_output model_runner_output", "engine/scheduler.py"),
    (f"{SCHEDULER}._preempt_request", "request timestamp drop_stale_output", "engine/scheduler.py"),
    (f"{SCHEDULER}._reserve_prefill_lookahead", "request num_computed_tokens num_new_tokens", "engine/scheduler.py"),
    (f"{SCHEDULER}._update_request_with_output", "request new_token_ids is_stale", "engine/scheduler.py"),
    (f"{DETOKENIZER}.__init__", "", "engine/stop_strings.py"),
    (f"{DETOKENIZER}.from_new_request", "tokenizer request", "engine/stop_strings.py"),
    (f"{DETOKENIZER}.update", "new_token_ids stop_terminated", "engine/stop_strings.py"),
    ("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "", "engine/worker.py"),
    ("vllm.v1.worker.gpu_worker:Worker.init_device", "", "engine/worker.py"),
    ("vllm.v1.worker.gpu_worker:Worker.load_model", "load_dummy_weights", "engine/worker.py"),
    ("vllm.v1.worker.gpu_worker:Worker.execute_model", "scheduler_output", "engine/worker.py"),
    ("vllm.v1.worker.gpu_worker:Worker.sample_tokens", "grammar_output", "engine/worker.py"),
    ("vllm:LLM.collective_rpc", "method timeout args kwargs", "engine/offline.py"),
    ("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc", "method timeout args kwargs", "host/rollout_actor.py"),
    ("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", "layer remove_weight", "engine/drafter.py"),
    ("vllm.distributed.utils:stateless_init_torch_distributed_process_group",
     "host port rank world_size backend group_name return_store listen_socket", "engine/gloo.py"),
    ("vllm.distributed.device_communicators.pynccl:PyNcclCommunicator.broadcast", "tensor src stream",
     "engine/gloo.py and host/weight_sync.py"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "names", "ours"), SIGNATURES, ids=[row[0].partition(":")[2] for row in SIGNATURES])
def test_signature(path: str, names: str, ours: str) -> None:
    assert_parameters(find(path), names.split(), f"skd_plugin/{ours}")


# --- model runner (engine/worker.py, engine/sampler.py) ---


@pytest.mark.parametrize(
    "name",
    "requests device drafter input_batch discard_request_mask use_async_scheduling num_spec_tokens model_config "
    "speculative_config input_ids prepare_inputs_event _draft_token_ids _draft_token_req_ids".split(),
)
def test_runner_has_the_attribute(name: str) -> None:
    assert name in attributes_set(find(f"{RUNNER}.__init__")), (
        f"GPUModelRunner sets no {name} any more; revisit skd_plugin/engine/worker.py, sampler.py and unread_drafts.py"
    )


def test_record_of_the_forward_is_there_when_tokens_are_sampled() -> None:
    """SKDWorker.sample_tokens reads the hidden states whose rows are those of the logits, before the runner does."""
    ours = "revisit SKDWorker.sample_tokens in skd_plugin/engine/worker.py"
    state = find("vllm.v1.worker.gpu_model_runner:ExecuteModelState")
    assert {"logits", "sample_hidden_states"} <= set(state._fields), ours
    assert "execute_model_state" in attributes_set(find(f"{RUNNER}.__init__")), ours
    execute = inspect.getsource(find(f"{RUNNER}.execute_model"))
    assert "sample_hidden_states = hidden_states[logits_indices]" in execute, ours
    assert "logits = self.model.compute_logits(sample_hidden_states)" in execute, ours
    for worker in ("gpu_worker:Worker", "cpu_worker:CPUWorker"):
        sample = inspect.getsource(find(f"vllm.v1.worker.{worker}.sample_tokens"))
        assert "return self.model_runner.sample_tokens(grammar_output)" in sample, f"{worker}; {ours}"


def test_runner_makes_a_plain_draft_model_proposer() -> None:
    """SKDWorker refuses any other drafter and puts its own in place of this one."""
    source = inspect.getsource(find(f"{RUNNER}.__init__"))
    assert "self.drafter = DraftModelProposer(" in source, "revisit _check_runner in skd_plugin/engine/worker.py"


def test_sampler_is_called_through_the_instance() -> None:
    """SKDWorker sets runner._sample; a call through the class would pass it by."""
    methods = [n for n in ast.walk(tree_of(find(RUNNER))) if isinstance(n, ast.FunctionDef)]
    callers: dict[str, set[str]] = {}
    for method in methods:
        for call in (n for n in ast.walk(method) if isinstance(n, ast.Call)):
            callers.setdefault(ast.unparse(call.func), set()).add(method.name)
    assert callers["self._sample"] == {"sample_tokens"}, "revisit skd_plugin/engine/worker.py"
    ours = "revisit skd_plugin/engine/unread_drafts.py"
    assert callers["self._prepare_input_ids"] == {"_prepare_inputs"}, ours
    assert callers["self._bookkeeping_sync"] == {"sample_tokens"}, ours
    assert callers["self._get_draft_token_ids_cpu"] == {"take_draft_token_ids", "_sample"}, ours
    for name in ("_sample", "_prepare_input_ids", "_bookkeeping_sync", "_get_draft_token_ids_cpu"):
        assert f"GPUModelRunner.{name}" not in callers, "revisit skd_plugin/engine/worker.py"
    for sampler in ("self.sampler", "self.rejection_sampler"):
        assert callers[sampler] <= {"_sample", "_dummy_sampler_run"}, "tokens come from another place; see sampler.py"


def test_cpu_runner_shares_the_code_that_we_replace() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    runner = find(RUNNER)
    assert issubclass(CPUModelRunner, runner), "revisit _check_runner in skd_plugin/engine/worker.py"
    for name in (
        "_sample", "sample_tokens", "_bookkeeping_sync", "propose_draft_token_ids", "_prepare_input_ids",
        "take_draft_token_ids", "_get_draft_token_ids_cpu",
    ):  # fmt: skip
        assert getattr(CPUModelRunner, name) is getattr(runner, name), f"{name}; revisit skd_plugin/engine/sampler.py"


OURS_OF_DRAFTS = "revisit skd_plugin/engine/unread_drafts.py"


def test_bookkeeping_reads_the_tokens_and_log_probs_of_a_step_alone() -> None:
    """It is given another record of them than the drafter."""
    tree = tree_of(find(f"{RUNNER}._bookkeeping_sync"))
    read = {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "sampler_output"
    }
    assert read == {"sampled_token_ids", "logprobs_tensors"}, OURS_OF_DRAFTS
    source = inspect.getsource(find(f"{RUNNER}.sample_tokens"))
    assert source.index("propose_draft_token_ids(sampled_token_ids)") < source.index("self._bookkeeping_sync("), (
        f"drafts no longer wait for the bookkeeping: is anything left to gain? {OURS_OF_DRAFTS}"
    )


def test_scheduler_counts_drafts_and_reads_none() -> None:
    tree = tree_of(find(f"{SCHEDULER}.update_from_output"))
    drafts = "scheduled_spec_token_ids"
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == drafts and isinstance(n.ctx, ast.Load)]
    counted = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n) == f"len({drafts})"]
    tested = [n for n in ast.walk(tree) if isinstance(n, ast.If) and drafts in ast.unparse(n.test)]
    assert len(uses) == len(counted) + len(tested) and counted, OURS_OF_DRAFTS


def test_inputs_are_made_when_the_last_ones_have_left_pinned_memory() -> None:
    """Where the runner has an event for it, as ours has on a GPU: else nobody would wait in a step without drafts."""
    execute, prepare = (inspect.getsource(find(f"{RUNNER}.{name}")) for name in ("execute_model", "_prepare_inputs"))
    assert execute.index("self.synchronize_input_prep()") < execute.index("self._prepare_inputs("), OURS_OF_DRAFTS
    assert execute.index("self.synchronize_input_prep()") < execute.index("self._update_states("), OURS_OF_DRAFTS
    wait = inspect.getsource(find(f"{RUNNER}.synchronize_input_prep"))
    order = [wait.index(f"self.prepare_inputs_event.{call}()") for call in ("synchronize", "record")]
    assert order == sorted(order), OURS_OF_DRAFTS
    assert prepare.index("self._prepare_input_ids(") < prepare.index("self._calc_spec_decode_metadata("), (
        OURS_OF_DRAFTS
    )


def test_a_kept_block_reads_as_its_tokens() -> None:
    """-1 is "no token"; the unused bonus place of a fully kept block is dropped, and a discarded row is empty."""
    from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler

    from skd_plugin.core.trace import NOTHING

    assert PLACEHOLDER_TOKEN_ID == NOTHING, "revisit skd_plugin/core/trace.py"
    block = torch.tensor([[4, 5, 6, -1], [7, -1, -1, -1], [8, -1, -1, -1]], dtype=torch.int32)
    tokens, _ = RejectionSampler.parse_output(block, 32, [2])
    assert tokens == [[4, 5, 6], [7], []], "revisit SKDSampler in skd_plugin/engine/sampler.py"


@pytest.mark.parametrize("emitted", [1, 2, 3])
def test_computed_tokens_after_a_block_without_bonus(emitted: int) -> None:
    """Three drafts: the KV cache holds the last token read and the emitted ones but the last, whatever was emitted."""
    lines = inspect.getsource(find(f"{SCHEDULER}.update_from_output"))
    assert "num_accepted = max(len(generated_token_ids) - num_sampled, 0)" in lines, "revisit engine/sampler.py"
    assert "num_rejected = num_draft_tokens - num_accepted" in lines
    scheduled = 1 + 3  # the last token and three drafts; advanced by the scheduler before the forward
    num_accepted = max(emitted - 1, 0)  # num_sampled_tokens_per_step is 1
    assert scheduled - (3 - num_accepted) == emitted


def test_scheduler_samples_one_token_a_step() -> None:
    import vllm.v1.core.sched.scheduler as module

    source = inspect.getsource(module)
    assert "self.num_sampled_tokens_per_step" in source
    default = attributes_set(find(f"{SCHEDULER}.__init__"))
    assert "num_sampled_tokens_per_step" in default, "revisit the bonus token in skd_plugin/engine/sampler.py"


FIELDS = [
    ("vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
     "draft_token_ids num_draft_tokens target_logits_indices", "engine/sampler.py"),
    ("vllm.v1.attention.backend:CommonAttentionMetadata",
     "query_start_loc query_start_loc_cpu seq_lens num_actual_tokens max_query_len block_table_tensor slot_mapping "
     "_seq_lens_cpu seq_lens_cpu_upper_bound _num_computed_tokens_cpu _num_computed_tokens_cache "
     "_token_to_req_indices_cache", "engine/drafter.py"),
    ("vllm.v1.outputs:SamplerOutput", "sampled_token_ids logprobs_tensors", "engine/unread_drafts.py"),
    ("vllm.v1.worker.gpu_input_batch:CachedRequestState", "sampling_params", "engine/request_table.py"),
    ("vllm.v1.core.sched.output:SchedulerOutput", "finished_req_ids scheduled_spec_decode_tokens",
     "engine/worker.py"),
    ("vllm.outputs:CompletionOutput", "token_ids text finish_reason stop_reason", "engine/request.py"),
    ("vllm.config:VllmConfig", "additional_config speculative_config", "engine/worker.py"),
    ("vllm.config:SpeculativeConfig", "method model num_speculative_tokens draft_sample_method",
     "engine/arguments.py"),
    ("vllm.config:SpeculativeConfig", "draft_model_config", "engine/worker.py and engine/vocabulary.py"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "names", "ours"), FIELDS, ids=[row[0].partition(":")[2] for row in FIELDS])
def test_fields(path: str, names: str, ours: str) -> None:
    missing = set(names.split()) - {f.name for f in dataclasses.fields(find(path))}
    assert not missing, f"{path} has no {', '.join(sorted(missing))}; revisit skd_plugin/{ours}"


def test_sampler_output_needs_nothing_more() -> None:
    from vllm.v1.outputs import SamplerOutput

    required = [f.name for f in dataclasses.fields(SamplerOutput) if f.default is dataclasses.MISSING]
    assert set(required) == {"sampled_token_ids", "logprobs_tensors"}, OURS_OF_DRAFTS


def test_input_batch_has_what_the_sampler_reads() -> None:
    from vllm.v1.worker.gpu_input_batch import InputBatch

    assert {"num_tokens_no_spec"} <= attributes_set(InputBatch.__init__), "revisit skd_plugin/engine/sampler.py"
    for name in ("req_ids", "num_reqs"):
        assert isinstance(getattr(InputBatch, name), property), f"InputBatch.{name}; revisit engine/sampler.py"


def test_metadata_lists_drafts_request_by_request() -> None:
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    made = SpecDecodeMetadata.make_dummy([[5, 6], [], [7]], torch.device("cpu"))
    assert made.num_draft_tokens == [2, 0, 1] and made.draft_token_ids.tolist() == [5, 6, 7], "revisit sampler.py"


# --- drafter (engine/drafter.py) ---


@pytest.mark.parametrize("name", ["_get_model", "_sample_draft_tokens", "propose"])
def test_draft_proposer_has_the_method(name: str) -> None:
    assert callable(getattr(find(DRAFTER), name, None)), f"{name} is gone; revisit skd_plugin/engine/drafter.py"


def test_draft_proposer_has_the_attributes() -> None:
    base = find("vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer")
    have = attributes_set(base.__init__, base.load_model)
    missing = {"draft_model_config", "model"} - have
    assert not missing, f"the drafter has no {missing}; revisit skd_plugin/engine/drafter.py"


def test_greedy_requests_are_drafted_by_our_sampler_too() -> None:
    """propose() has no way round _sample_draft_tokens except for the methods that we do not use."""
    source = ast.unparse(tree_of(find(f"{DRAFTER}.propose")))
    assert source.count("self._sample_draft_tokens(") >= 2, "revisit skd_plugin/engine/drafter.py"
    assert "_greedy_sample" not in source, "revisit skd_plugin/engine/drafter.py"


def test_sampling_metadata_of_the_drafts_goes_through_unread() -> None:
    """SKDDrafter puts its own record of a step in its place."""
    tree = tree_of(find(f"{DRAFTER}.propose"))
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "sampling_metadata"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    sampling = [call for call in calls if ast.unparse(call.func) == "self._sample_draft_tokens"]
    handed = [argument for call in sampling for argument in call.args[1:]]
    assert len(uses) == len(handed) and all(use in handed for use in uses), "revisit skd_plugin/engine/drafter.py"


def test_drafter_is_called_by_keywords() -> None:
    tree = tree_of(find(f"{RUNNER}.propose_draft_token_ids"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ours = [c for c in calls if ast.unparse(c.func) == "self.drafter.propose" and not c.args]
    wanted = {"common_attn_metadata", "sampling_metadata", "num_rejected_tokens_gpu"}
    assert any(wanted <= {keyword.arg for keyword in call.keywords} for call in ours), "revisit engine/drafter.py"


# --- worker (engine/worker.py, host/weight_sync.py) ---


@pytest.mark.parametrize("path", ["vllm.v1.worker.cpu_worker:CPUWorker", "vllm.v1.worker.gpu_worker:Worker"])
def test_worker_makes_its_runner_in_init_device(path: str) -> None:
    worker = find(path)
    assert_parameters(worker.init_device, [], "skd_plugin/engine/worker.py")
    source = inspect.getsource(worker.init_device)
    assert "self.model_runner" in source, "SKDWorker.init_device finds no runner; revisit skd_plugin/engine/worker.py"


def test_worker_loads_its_model_after_init_device() -> None:
    """The drafter is replaced in between."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    source = inspect.getsource(UniProcExecutor)
    order = [source.index(f'"{name}"') if f'"{name}"' in source else source.index(f".{name}(")
             for name in ("init_device", "load_model")]  # fmt: skip
    assert order == sorted(order), "revisit skd_plugin/engine/worker.py"


def test_extension_has_no_name_of_the_worker() -> None:
    """vLLM mixes the extension into our worker class and refuses a name that both have."""
    from skd_plugin.engine.worker import SKDWorker
    from skd_plugin.host.weight_sync import StudentWeights

    if StudentWeights in SKDWorker.__mro__:
        pytest.skip("an engine of this process has already mixed them")
    shared = [name for name in dir(StudentWeights) if not name.startswith("__") and hasattr(SKDWorker, name)]
    assert not shared, f"rename {shared} in skd_plugin/host/weight_sync.py"


def test_methods_that_are_called_by_name_exist() -> None:
    from skd_plugin.engine.worker import SKDWorker
    from skd_plugin.host.weight_sync import StudentWeights

    assert all(hasattr(SKDWorker, name) for name in ("take_traces", "describe_skd", "load_student"))
    assert hasattr(StudentWeights, "receive_student") and hasattr(StudentWeights, "init_process_group")


def test_engine_resolves_our_paths() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from skd_plugin.engine.arguments import WORKER_CLS
    from skd_plugin.host.weight_sync import WORKER_EXTENSION_CLS

    assert resolve_obj_by_qualname(WORKER_CLS).__name__ == "SKDWorker"
    assert resolve_obj_by_qualname(WORKER_EXTENSION_CLS).__name__ == "StudentWeights"


# --- engine arguments (engine/arguments.py, engine/set_up.py) ---


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    return make_spec(cpu=request.param).arguments()


def test_engine_args_have_our_fields(arguments: dict[str, Any]) -> None:
    from vllm import AsyncEngineArgs, EngineArgs

    wanted = set(arguments) | set(make_spec().plain_arguments()) | {"worker_extension_cls"}
    for args in (EngineArgs, AsyncEngineArgs):
        missing = wanted - {f.name for f in dataclasses.fields(args)}
        assert not missing, f"{args.__name__} has no {missing}; revisit skd_plugin/engine/arguments.py"


def test_speculative_config_has_our_fields(arguments: dict[str, Any]) -> None:
    from vllm.config import SpeculativeConfig
    from vllm.config.speculative import DraftSampleMethod

    given = arguments["speculative_config"]
    assert set(given) <= {f.name for f in dataclasses.fields(SpeculativeConfig)}, "revisit engine/arguments.py"
    assert given["draft_sample_method"] in DraftSampleMethod.__args__, "revisit skd_plugin/engine/arguments.py"


def test_a_rounding_is_the_teachers_alone(tiny_pair: Path) -> None:
    """SpeculativeConfig has its own `quantization`, and the drafter takes nothing from the configuration around it."""
    from vllm import EngineArgs

    from skd_plugin.engine.drafter import SKDDrafter

    rounded = {"quantization": "fp8_per_channel", "dtype": "bfloat16", "max_num_batched_tokens": 64}
    teacher, student = (str(tiny_pair / name) for name in ("teacher", "student"))
    spec = make_spec(teacher=teacher, student=student, options=rounded)
    config = EngineArgs(**spec.arguments()).create_engine_config()
    assert (config.model_config.quantization, config.quant_config.get_name()) == ("fp8_per_channel", "online")
    assert config.speculative_config.draft_model_config.quantization is None
    drafter = object.__new__(SKDDrafter)
    drafter.vllm_config, drafter.speculative_config = config, config.speculative_config
    assert drafter._create_draft_vllm_config().quant_config is None


def test_sizes_of_the_vocabularies_are_compared_in_one_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the configuration and by the drafter, both through the method that allow_padding replaces."""
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    from skd_plugin.engine import vocabulary

    name, host = vocabulary.VLLM_CHECK, vocabulary.vllm_check
    because = "it compares the two sizes and does nothing else, so that it can be left out"
    assert_unchanged(host, "8f7a7b01b765", HOST, "skd_plugin/engine/vocabulary.py", because)
    assert f"self.{name}()" in inspect.getsource(SpeculativeConfig), "revisit skd_plugin/engine/vocabulary.py"
    assert f"speculative_config.{name}()" in inspect.getsource(DraftModelProposer), "revisit engine/vocabulary.py"

    def config(teacher: int, student: int) -> SimpleNamespace:
        models = [SimpleNamespace(get_vocab_size=lambda size=size: size) for size in (teacher, student)]
        return SimpleNamespace(method="draft_model", target_model_config=models[0], draft_model_config=models[1])

    with pytest.raises(ValueError, match="should have the same vocabulary size"):
        host(config(7, 8))
    monkeypatch.setattr(SpeculativeConfig, name, host)
    vocabulary.allow_padding()
    assert getattr(SpeculativeConfig, name)(config(7, 8)) is None, "revisit skd_plugin/engine/vocabulary.py"


def test_vocabulary_check_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import SpeculativeConfig

    from skd_plugin.engine import vocabulary

    monkeypatch.delattr(SpeculativeConfig, vocabulary.VLLM_CHECK)
    with pytest.raises(RuntimeError, match="Run pytest tests/contract"):
        vocabulary.allow_padding()


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_USE_V2_MODEL_RUNNER", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_TARGET_DEVICE", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_LOGGING_LEVEL",
    ],
)  # fmt: skip
def test_environment_variable_is_read(name: str) -> None:
    from vllm import envs

    assert name in envs.environment_variables, f"vLLM reads no {name}; revisit engine/set_up.py and cpu.py"


def test_v1_runner_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig

    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
        chosen = find("vllm.config:VllmConfig.use_v2_model_runner")(SimpleNamespace(model_config=None))
        assert chosen is expected, f"{VllmConfig.__name__}; revisit skd_plugin/engine/set_up.py"


def test_sampling_parameters_carry_ours() -> None:
    """extra_args survive the copies on the way to the worker; what is changed of the given ones can be."""
    from vllm import SamplingParams

    given = SamplingParams(top_k=0, min_tokens=1, max_tokens=9, logprobs=1, stop_token_ids=[5])
    assert given.top_k == 0, "revisit NEUTRAL in skd_plugin/engine/request.py"
    params = make_request([1, 2], sampling_params=given, trace_id=7, max_new_tokens=5).sampling_params
    ours = "revisit prepare_request in skd_plugin/engine/request.py"
    assert isinstance(params, SamplingParams) and (params.max_tokens, params.temperature) == (6, 1.0), ours
    assert (params.detokenize, params.logprobs, params.stop_token_ids) == (False, None, [5, 2]), ours
    assert copy.deepcopy(params).extra_args["skd"]["trace_id"] == 7, ours
    assert given.max_tokens == 9 and given.extra_args is None, ours


def test_scheduler_is_asked_for_each_requests_new_tokens() -> None:
    """SKDScheduler overrides the one place where a request's tokens are looked at for an end token."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from skd_plugin.engine.scheduler import SKDScheduler

    source = inspect.getsource(Scheduler.update_from_output)
    assert "self._update_request_with_output(" in source, "revisit skd_plugin/engine/scheduler.py"
    ours, host = SKDScheduler._update_request_with_output, Scheduler._update_request_with_output
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(host).parameters)


def test_a_request_keeps_its_tokens_in_two_lists() -> None:
    """SKDScheduler takes the last one off both when the request is preempted."""
    kept = attributes_set(find("vllm.v1.request:Request.__init__"))
    assert {"_output_token_ids", "_all_token_ids", "spec_token_ids"} <= kept, "revisit skd_plugin/engine/scheduler.py"


def test_llm_takes_one_parameter_set_a_prompt() -> None:
    from vllm import LLM

    parameters = inspect.signature(LLM.generate).parameters
    assert {"prompts", "sampling_params", "use_tqdm"} <= set(parameters), "revisit SKDEngine in engine/offline.py"


def test_a_plain_response_has_a_random_stream_of_its_own() -> None:
    """`skd eval` draws the same samples again, whatever else is in the batch; at temperature 0 it draws none."""
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingType

    from skd_plugin.engine.offline import plain_params

    ours = "revisit plain_params in skd_plugin/engine/offline.py"
    params = plain_params(1.0, 7, [2], -5)
    assert params.sampling_type is SamplingType.RANDOM_SEED and params.seed >= 0, ours
    assert plain_params(0.0, 7, [2], 5).sampling_type is SamplingType.GREEDY, ours
    assert (params.max_tokens, params.stop_token_ids, params.detokenize, params.top_p) == (7, [2], False, 1.0), ours
    update = inspect.getsource(find(f"{RUNNER}._update_states"))
    assert "generator.manual_seed(sampling_params.seed)" in update, ours
    names = {field.name for field in dataclasses.fields(CompletionOutput)}
    assert {"token_ids", "finish_reason"} <= names, "revisit PlainEngine in skd_plugin/engine/offline.py"


def test_async_engine_methods_are_awaited_or_not_as_we_do() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert inspect.iscoroutinefunction(AsyncLLM.collective_rpc), "revisit skd_plugin/host/rollout_actor.py"
    assert inspect.iscoroutinefunction(AsyncLLM.reset_prefix_cache), "revisit skd_plugin/host/policy_actor.py"


def test_a_prompt_of_tokens_that_has_its_type_is_not_looked_at_in_another_thread() -> None:
    from vllm.inputs import tokens_input
    from vllm.v1.engine.async_llm import AsyncLLM

    from skd_plugin.engine.request import prompt_of_tokens

    ours = "revisit prompt_of_tokens in skd_plugin/engine/request.py"
    assert prompt_of_tokens(prompt_token_ids=[5, 6]) == tokens_input(prompt_token_ids=[5, 6]), ours
    source = inspect.getsource(AsyncLLM.add_request)
    typed = source.index('isinstance(prompt, dict) and "type" in prompt')
    assert typed < source.index("process_inputs(") < source.index("process_inputs_async("), ours


# --- loadable weights (engine/drafter.py) ---


@pytest.mark.parametrize("module", ["linear", "vocab_parallel_embedding"])
def test_packing_is_imported_when_it_is_called(module: str) -> None:
    """An import at the top of the module would keep vLLM's own function in place."""
    loaded = importlib.import_module(f"vllm.model_executor.layers.{module}")
    inside = imports_inside(loaded)
    assert ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm") in inside, "revisit engine/drafter.py"
    assert not hasattr(loaded, "dispatch_cpu_unquantized_gemm"), (
        "revisit loadable_weights in skd_plugin/engine/drafter.py"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="packing is for CPUs")
def test_weights_loaded_inside_stay_readable() -> None:
    import vllm.model_executor.layers.utils as layers
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from skd_plugin.engine.drafter import loadable_weights

    original = layers.dispatch_cpu_unquantized_gemm
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)
    with loadable_weights():
        UnquantizedLinearMethod().process_weights_after_loading(layer)
    assert layers.dispatch_cpu_unquantized_gemm is original
    assert layer.weight.shape == (2, 3), (
        "the weight was packed; revisit loadable_weights in skd_plugin/engine/drafter.py"
    )
    layer.weight.data.fill_(1.0)
    out = layer.cpu_linear(torch.ones(1, 3), layer.weight, None)
    assert out.tolist() == [[3.0, 3.0]], "new weights are not used; revisit skd_plugin/engine/drafter.py"


def test_vllm_loses_the_temperatures_of_proposals_on_a_cpu() -> None:
    """Once this fails, `Speculation` of scripts/ways_of_sampling.py can do without its own `expand`."""
    from vllm.platforms import current_platform
    from vllm.utils.cpu_triton_utils import expand_kernel

    current_platform.import_kernels()

    expanded = torch.full((3,), 7.0)
    expand_kernel[(2,)](expanded, torch.tensor([0.5, 2.0]), torch.tensor([1, 3]), 0, 1, MAX_NUM_TOKENS=128)
    assert expanded.tolist() == [7.0, 7.0, 7.0]


def test_a_process_of_an_engine_is_known_by_its_name() -> None:
    from skd_plugin.engine.set_up import ENGINE_PROCESS

    source = inspect.getsource(importlib.import_module("vllm.v1.engine.utils").CoreEngineProcManager)
    assert f'else "{ENGINE_PROCESS}"' in source and f'f"{ENGINE_PROCESS}_DP' in source
