"""Arithmetic with five operations a story, the most that its models were trained on; most stories have fewer."""

from skd_plugin.tasks.arithmetic import Arithmetic


class FiveSteps(Arithmetic):
    name = "five_steps"
    num_steps = (5, 5)


TASK = FiveSteps
