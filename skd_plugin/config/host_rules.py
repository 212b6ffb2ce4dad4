"""What a distillation run asks of OpenRLHF's options: values set for the user, values refused, and why."""

from __future__ import annotations

from typing import Any

from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.recipe import flatten
from skd_plugin.config.schema import SKDConfig
from skd_plugin.errors import RecipeError

NO_REWARD = "skd:no-reward"  # stands in reward.remote_url, without which OpenRLHF starts a reward model

# Reward-free training: OpenRLHF starts no reference model (kl 0) and no critic (reinforce).
DEFAULTS: dict[str, Any] = {
    "algo.kl.init_coef": 0,
    "algo.advantage.estimator": "reinforce",
    "rollout.n_samples_per_prompt": 1,
    "vllm.num_engines": 1,
    "vllm.enable_prefix_caching": True,
    "eval.temperature": 0,
    "eval.n_samples_per_prompt": 1,
    "ckpt.best_metric_key": "none",
    "ckpt.save_steps": 50,
    "ckpt.max_num": 2,
}
CPU_DEFAULTS: dict[str, Any] = {
    # OpenRLHF's 8 each are as many as there are (cpu.LOGICAL_GPUS), so that two models would wait for each other.
    **{f"{model}.num_gpus_per_node": 1 for model in ("actor", "critic", "ref", "reward")},
    "ds.zero_stage": 0,
    "ds.attn_implementation": "sdpa",
    "vllm.sync_backend": "gloo",
    "vllm.enforce_eager": True,
}

IMAGES = (
    "the student would draft without seeing the image: vLLM hands a draft model token ids only, and refuses one with "
    "M-RoPE (Qwen-VL)"
)
# What is not supported: option -> (allowed value, reason). Together with REWARD_FREE the one list of refusals.
FIXED: dict[str, tuple[Any, str]] = {
    "rollout.temperature": (1.0, "OpenRLHF divides the trained logits by it; set skd.rollout.student_temperature"),
    "rollout.top_p": (1.0, "set skd.rollout.student_top_p"),
    "data.max_images_per_prompt": (0, IMAGES),
    "data.image_key": ("images", IMAGES),
    "actor.freeze_visual_encoder": (False, IMAGES),
    "ds.load_in_4bit": (False, "quantised weights do not load into the engine's draft model"),
    "ds.param_dtype": ("bf16", "the engine's student is bfloat16 (float32 on a CPU, whatever this says)"),
    "use_ms": (False, "models and datasets come from Hugging Face or from disk"),
}
# Likewise, of a run whose skd.objective.rl_coef is 0: nothing would read them.
REWARD_FREE: dict[str, tuple[Any, str]] = {
    "algo.kl.init_coef": (0, "a run without rewards has no reference model; the teacher takes its place"),
    "algo.advantage.estimator": ("reinforce", "a run without rewards needs no critic and no groups"),
    "algo.dynamic_filtering_enable": (False, "it filters by rewards"),
    "algo.advantage.is_correction_level": ("off", "it corrects a policy gradient, and there is none"),
    "reward.model_name_or_path": (None, "nothing would use its rewards"),
    "reward.overlong_buffer_len": (None, "it changes rewards, and there are none"),
    "reward.stop_properly_penalty_coef": (None, "it changes rewards, and there are none"),
}


def complete(host: HostOptions, *, cpu: bool) -> dict[str, Any]:
    """OpenRLHF's options by their dotted names with the defaults of a distillation run; what the user wrote wins."""
    return {**DEFAULTS, **(CPU_DEFAULTS if cpu else {}), **flatten(host)}


def check(options: HostOptions, skd: SKDConfig) -> None:
    """Raises RecipeError at the first option that a distillation run cannot honour, and at missing ones.

    Args:
        options: all of them, with OpenRLHF's own defaults.
    """
    for key, (allowed, reason) in {**FIXED, **({} if skd.objective.uses_rewards else REWARD_FREE)}.items():
        if key in options and options[key] is not None and options[key] != allowed:
            hint = "; set skd.objective.rl_coef above 0 to mix rewards in" if key in REWARD_FREE else ""
            raise RecipeError(f"openrlhf.{key} is {options[key]!r}, but must be {allowed!r}: {reason}{hint}")
    if not options.get("data.prompt_dataset"):
        raise RecipeError("openrlhf.data.prompt_dataset is missing: name a dataset, or give the recipe a skd.task")
    if (options["vllm.num_engines"] or 0) < 1:
        raise RecipeError(f"openrlhf.vllm.num_engines is {options['vllm.num_engines']}, but SKD samples in an engine")
    if options["ckpt.max_num"] < 2:
        raise RecipeError(
            f"openrlhf.ckpt.max_num is {options['ckpt.max_num']}, but must be 2 or more: OpenRLHF deletes the oldest "
            "checkpoint before it writes the next, and a run that dies in between would have none"
        )
    if options["ds.enable_sleep"] and not options["ds.zero_stage"]:
        raise RecipeError(
            "openrlhf.ds.enable_sleep is on, but at openrlhf.ds.zero_stage = 0 DeepSpeed cannot move the optimizer "
            "off the GPU; set zero_stage to 1 or more"
        )
    if options["train.async_enable"]:
        _check_async(options)
    elif options["train.partial_rollout_enable"]:
        raise RecipeError(
            "openrlhf.train.partial_rollout_enable needs openrlhf.train.async_enable: in a synchronous run no "
            "response is in flight when weights change"
        )
    if options["train.enable_ema"] and options["ds.zero_stage"] == 3:
        raise RecipeError(
            "openrlhf.train.enable_ema is on, but at openrlhf.ds.zero_stage = 3 DeepSpeed throws away what OpenRLHF "
            "adds to its running mean: the saved model would be the one of the start. Set zero_stage to 2 or less"
        )
    if options["vllm.num_engines"] < len(skd.teachers):
        raise RecipeError(
            f"there are {len(skd.teachers)} teachers (skd.teachers: {', '.join(skd.teachers)}), but "
            f"openrlhf.vllm.num_engines is {options['vllm.num_engines']}: an engine has one teacher beside the "
            f"student. Set it to {len(skd.teachers)} or more, or train by one teacher after the other, each time the "
            "student of the run before (skd.teacher)"
        )
    if skd.teacher is not None and skd.teacher.follow is not None:
        _check_follow(options, skd)
    _check_batches(options)
    _check_ring(options, skd)
    if options["ds.tensor_parallel_size"] > 1:
        _check_tensor_parallel(options, skd)
    if options["ds.lora.rank"]:
        _check_adapters(options)
    if skd.objective.uses_rewards:
        _check_rewards(options, teacher_advantage=skd.objective.teacher_advantage)
    if skd.rollout.needs_references:
        _check_references(options, method=skd.rollout.method)
    if skd.loss.vocabulary == "full" and options.get("ds.deepcompile"):
        raise RecipeError(
            "openrlhf.ds.deepcompile is on, but skd.loss.vocabulary=full replaces the forward of the output head, "
            "which a compiled model would not call; turn one of them off"
        )


def _check_ring(options: HostOptions, skd: SKDConfig) -> None:
    """Raises RecipeError where tokens cannot be spread over the ranks of a ring."""
    ring = options["ds.ring_attn_size"]
    if ring == 1:
        return
    name, actors = (
        f"openrlhf.ds.ring_attn_size is {ring}",
        options["actor.num_nodes"] * options["actor.num_gpus_per_node"],
    )
    if actors % ring:
        raise RecipeError(
            f"{name}, but openrlhf.actor.num_nodes x num_gpus_per_node = {actors} actors make no whole rings of it"
        )
    if not options["ds.packing_samples"]:
        raise RecipeError(f"{name}, but a ring divides packed sequences; set openrlhf.ds.packing_samples=true")
    if skd.loss.chunk is None or options["ds.deepcompile"]:
        raise RecipeError(
            f"{name}, but the loss of tokens on several ranks is read off the output head: leave skd.loss.chunk and "
            "openrlhf.ds.deepcompile at their defaults"
        )


def _check_tensor_parallel(options: HostOptions, skd: SKDConfig) -> None:
    """Raises RecipeError for what has not been shown to be right where each rank has a part of every layer."""
    name = f"openrlhf.ds.tensor_parallel_size is {options['ds.tensor_parallel_size']}"
    actors = options["actor.num_nodes"] * options["actor.num_gpus_per_node"]
    if actors % options["ds.tensor_parallel_size"]:
        raise RecipeError(
            f"{name}, but openrlhf.actor.num_nodes x num_gpus_per_node = {actors} actors make no whole groups of it"
        )
    untried = "nobody has compared it with a run without tensor parallelism"
    beside = {
        "skd.loss.vocabulary=full": (skd.loss.vocabulary == "full", "no rank has the whole output head that it reads"),
        "skd.teacher.follow": (skd.any_teacher.follow is not None, untried),
        "openrlhf.train.colocate_all": (options["train.colocate_all"], "OpenRLHF then shares no memory with engines"),
        "openrlhf.ds.ring_attn_size": (options["ds.ring_attn_size"] > 1, "its loss is read off the output head"),
        "openrlhf.ds.lora.rank": (options["ds.lora.rank"] > 0, untried),
        "openrlhf.ds.zero_stage=3": (options["ds.zero_stage"] == 3, "transformers loads no student for both"),
        "openrlhf.ds.zpg": (options["ds.zpg"] > 1, untried),
        "openrlhf.algo.kl.init_coef (a reference model)": (options["algo.kl.init_coef"] > 0, untried),
        "openrlhf.algo.advantage.estimator=gae (a critic)": (options["algo.advantage.estimator"] == "gae", untried),
        "openrlhf.reward.model_name_or_path": (bool(options["reward.model_name_or_path"]), untried),
    }
    for option in ("train.enable_ema", "ds.deepcompile", "ds.use_liger_kernel", "ds.use_universal_ckpt"):
        beside[f"openrlhf.{option}"] = (options[option], untried)
    for other, (is_on, why) in beside.items():
        if is_on:
            raise RecipeError(f"{name} beside {other}: {why}; leave one of them out")


def planned_steps(prompts: int, batch_size: int, episodes: int) -> int:
    """Steps of a run, each a roll-out of `batch_size` prompts with its updates; what does not fill one is left out.

    OpenRLHF's `max_steps` counts updates of the weights, which are more where train.batch_size is smaller than a
    roll-out or train.max_epochs is above 1. With dynamic filtering there are fewer steps than planned.
    """
    return prompts // batch_size * episodes


def check_number(prompts: int, options: HostOptions, where: str = "") -> None:
    """Raises RecipeError where a run would come to its end without a single step.

    Args:
        prompts: how many there are.
        where: they are, for the error.
    """
    used = min(prompts, options["data.max_samples"])
    if used < options["rollout.batch_size"]:
        limit = f" (openrlhf.data.max_samples leaves {used} of {prompts})" if used < prompts else ""
        raise RecipeError(
            f"{where}there are {used} prompts, but a step needs openrlhf.rollout.batch_size = "
            f"{options['rollout.batch_size']}; give more prompts or make the batch smaller{limit}"
        )


def _check_follow(options: HostOptions, skd: SKDConfig) -> None:
    """Raises RecipeError where the teacher could not take the student's weights."""
    student = options["actor.model_name_or_path"]
    refused = {
        f"skd.teacher.model_name_or_path is another model than the student's, {student}": (
            skd.the_teacher.model_name_or_path != student
        ),
        "skd.loss.vocabulary is full, whose output head of the teacher stands still": skd.loss.vocabulary == "full",
        "openrlhf.ds.lora.rank is above 0, and a mean of adapters is no mean of models": bool(options["ds.lora.rank"]),
        "openrlhf.ds.zpg is above 1, whose second shards it does not know": options["ds.zpg"] > 1,
        "the teacher's weights are rounded (skd.vllm quantization)": "quantization" in skd.vllm,
    }
    for reason, applies in refused.items():
        if applies:
            raise RecipeError(f"skd.teacher.follow cannot be: {reason}")


def _check_async(options: HostOptions) -> None:
    if options["vllm.enable_sleep"]:
        raise RecipeError(
            "openrlhf.vllm.enable_sleep is on, but with openrlhf.train.async_enable the engines sample while the "
            "trainer trains, each on GPUs of its own; turn one of them off"
        )
    if options["ckpt.best_metric_key"] != "none":
        raise RecipeError(
            "openrlhf.ckpt.best_metric_key is set, but OpenRLHF's asynchronous trainer hears of an evaluation a step "
            "later, and would save that step's student as the best; leave it at none"
        )


def _check_adapters(options: HostOptions) -> None:
    """Raises RecipeError for what OpenRLHF cannot do beside LoRA adapters."""
    beside = {
        "train.enable_ema": "its average pairs the parameters of a model with adapters with those of one without",
        "ds.use_liger_kernel": "its layers have not been tried with adapters",
        "ds.deepcompile": "adapters have not been tried in a compiled model",
    }
    for option, why in beside.items():
        if options[option]:
            raise RecipeError(f"openrlhf.{option} is on beside openrlhf.ds.lora.rank: {why}; turn one of them off")
    if options["algo.advantage.estimator"] == "gae":
        raise RecipeError(
            "openrlhf.algo.advantage.estimator gae beside openrlhf.ds.lora.rank: OpenRLHF gives the critic adapters, "
            "too, and freezes its new value head; take an estimator without a critic, or train without adapters"
        )


def _check_batches(options: HostOptions) -> None:
    if options["train.batch_size"] % options["train.micro_batch_size"]:
        raise RecipeError(
            f"openrlhf.train.batch_size = {options['train.batch_size']} is not a multiple of train.micro_batch_size = "
            f"{options['train.micro_batch_size']}: OpenRLHF would drop the rest"
        )
    per_rollout = options["rollout.batch_size"] * options["rollout.n_samples_per_prompt"]
    if per_rollout % options["train.batch_size"]:
        raise RecipeError(
            f"openrlhf.rollout.batch_size x n_samples_per_prompt is {per_rollout}, not a multiple of "
            f"openrlhf.train.batch_size = {options['train.batch_size']}: the rest of a rollout would go to waste"
        )
    asked = options["rollout.vllm_generate_batch_size"]
    if asked is not None and asked != options["rollout.batch_size"]:
        raise RecipeError(
            f"openrlhf.rollout.vllm_generate_batch_size is {asked}, but a step takes rollout.batch_size = "
            f"{options['rollout.batch_size']} prompts, all of which are sent to the engines at once; leave it out"
        )


def _check_rewards(options: HostOptions, *, teacher_advantage: float) -> None:
    """Raises RecipeError where the policy loss has nothing to learn from."""
    sources = ("reward.remote_url", "reward.model_name_or_path", "train.agent_func_path")
    if options.get("reward.remote_url") == NO_REWARD and not teacher_advantage:
        raise RecipeError(
            "skd.objective.rl_coef is above 0, but the recipe names no reward: give one of "
            f"{', '.join('openrlhf.' + name for name in sources)}, a skd.task, or skd.objective.teacher_advantage"
        )


def _check_references(options: HostOptions, *, method: str) -> None:
    """Raises RecipeError where the prompts have no references, or would have the same one several times."""
    name = f"skd.rollout.method {method}"
    if options.get("train.agent_func_path"):
        raise RecipeError(
            f"{name} puts references in place of responses, but openrlhf.train.agent_func_path names an agent, whose "
            "turns have no reference; use method skd, on_policy or teacher"
        )
    if not options.get("data.label_key"):
        raise RecipeError(
            f"{name} needs references: name the dataset's column of them in openrlhf.data.label_key, or give the "
            "recipe a skd.task"
        )
    if options["rollout.n_samples_per_prompt"] != 1:
        raise RecipeError(
            f"openrlhf.rollout.n_samples_per_prompt is {options['rollout.n_samples_per_prompt']}, but a prompt has "
            f"one reference, so that {name} would train on copies of it; set it to 1"
        )
