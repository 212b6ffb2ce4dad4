"""An agent for `openrlhf.train.agent_func_path`: the student writes the sums, a calculator writes the results.

    student:     " first 47 + 38 ="
    calculator:  " 85 ."
    student:     " then 85 - 12 ="
    calculator:  " 73 ."
    student:     " the answer is 73"

Written as any agent of OpenRLHF is; nothing in it knows of SKD. What the calculator writes is never trained.
"""

import re
from copy import deepcopy

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

from skd_plugin.tasks.label import Label

SUM = re.compile(r"(\d+) ([+-]) (\d+) =$")


class Calculator(AgentInstanceBase):
    def __init__(self):
        self._written = ""  # by the student and the calculator

    async def step(self, states, **kwargs):
        self._written += states["action_text"]
        label = Label.parse(states["label"])
        asked = SUM.search(self._written)
        if asked:
            left, sign, right = asked.groups()
            result = f" {int(left) + int(right) if sign == '+' else int(left) - int(right)} ."
            self._written += result
            return {"rewards": torch.tensor(0.0), "environment_feedback": result, "done": False}
        score = torch.tensor(label.checker().score(self._written.removesuffix(label.end_token), label.answer))
        return {"rewards": score, "scores": score, "environment_feedback": "", "done": True}


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Calculator)

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        sampling_params = deepcopy(sampling_params)
        sampling_params.stop_token_ids = hf_tokenizer(" =", add_special_tokens=False).input_ids  # the student asks
        return await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images)
