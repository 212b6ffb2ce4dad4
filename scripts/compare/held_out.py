"""Held-out prompts of a run, answered by one student after another in an engine of the run's models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from skd_plugin.run_folder import RunFolder


class HeldOut:
    """Prompts are of the test split; the same prompts and random numbers for every student."""

    def __init__(self, folder: Path, draft_len: int | None = None) -> None:
        """Args: draft_len: default: the run's."""
        from skd_plugin.engine.set_up import set_up_offline

        set_up_offline()
        from skd_plugin.config.host_options import host_defaults
        from skd_plugin.config.run import Run as Config
        from skd_plugin.engine.arguments import engine_for
        from skd_plugin.engine.offline import SKDEngine
        from skd_plugin.models import load_tokenizer
        from skd_plugin.prepare.task_prompts import make_task

        config = Config.load(RunFolder(folder))
        self.rollout, self.first_student = config.skd.rollout, Path(config.host["actor.model_name_or_path"])
        self._draft_len, self._task = draft_len or self.rollout.most_drafts, make_task(config.skd.task)
        student = str(self.first_student)
        self._tokenizer = load_tokenizer(student, "student")
        spec = engine_for(config.skd, {**host_defaults(), **config.host}, student=student, cpu=config.cpu)
        self._engine = SKDEngine(replace(spec, teacher_hidden=False, draft_len=self._draft_len))

    def put(self, student: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(student, dtype="float32")
        self._engine.load_student([(name, weight.detach()) for name, weight in model.named_parameters()])

    def metrics(self, settings: Any, count: int, seed: int) -> dict[str, float]:
        """Those of roll-outs, by their names, for prompts of the run's task; and `tokens`, the number of all."""
        from skd_plugin.core.metrics import figures_of, rollout_metrics

        answers = self._answers(self._task, settings, self.rollout.max_new_tokens, count, seed)
        traces = [answer.trace for _, answer in answers]
        metrics = rollout_metrics([figures_of(trace, self._draft_len) for trace in traces])
        return {**metrics, "tokens": sum(map(len, traces))}

    def score(self, task: str, count: int, seed: int, *, by_teacher: bool) -> float:
        """Mean score of greedy answers to prompts of another task, the student's or the teacher's."""
        from skd_plugin.core.sampling import KEEP_ALL, SamplingSettings
        from skd_plugin.tasks import find_task

        own = find_task(task)()
        greedy = SamplingSettings(0 if by_teacher else KEEP_ALL, student_temperature=0.0, teacher_temperature=0.0)
        answers = self._answers(own, greedy, None, count, seed)
        texts = ((example, self._engine.decode(answer.trace.response_ids.tolist())) for example, answer in answers)
        return sum(own.score(text, example.label) for example, text in texts) / count

    def _answers(
        self, task: Any, settings: Any, max_new_tokens: int | None, count: int, seed: int
    ) -> list[tuple[Any, Any]]:
        """Examples with their answers. Args: max_new_tokens: default: the task's."""
        from skd_plugin.engine.sampling_rule import SamplingRule

        examples = task.examples("test", count, seed=seed)
        prompts = [self._tokenizer(example.prompt, add_special_tokens=False).input_ids for example in examples]
        limit = max_new_tokens or task.max_new_tokens
        answers = self._engine.generate(prompts, SamplingRule(settings), limit, seed=seed)
        return list(zip(examples, answers, strict=True))
