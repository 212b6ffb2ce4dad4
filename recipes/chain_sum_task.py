"""reasoning-gym's chain_sum with its sums written out, so that there are steps to distil:

    State the final answer to the following arithmetic problem: 41 - 7 + 30 = by steps :
    -> 41 - 7 = 34 , 34 + 30 = 64 . <answer>64</answer>

Problems and scores are reasoning-gym's. For recipes/chain-sum-then-rewards.yaml; scripts/make_task_models.py has made
the pair in recipes/models/chain-sum.
"""

from string import digits
from types import MappingProxyType

from skd_plugin.tasks.base import Example
from skd_plugin.tasks.reasoning_gym import Entry, ReasoningGym

WORDS = "State the final answer to the following arithmetic problem by steps".split()
SIGNS = "+-=,.:<>/"


class ChainSum(ReasoningGym):
    name = "chain_sum_steps"
    dataset = "chain_sum"
    parameters = MappingProxyType({"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2})
    max_new_tokens = 52
    template = "{question} by steps :"

    def _example(self, entry: Entry) -> Example:
        steps = ",".join(_steps(entry["metadata"]["expression"].split()))
        plain = super()._example(entry)
        return plain._replace(reference=f"{steps} . {plain.reference}")

    def vocabulary(self) -> list[str]:
        """Every word, digit and sign, with a blank before it and without."""
        return [token for word in (*WORDS, *digits, *SIGNS) for token in (f" {word}", word)]


def _steps(terms: list[str]) -> list[str]:
    """From `4 - 1 - 7`: ` 4 - 1 = 3 `, ` 3 - 7 = -4`."""
    total, steps = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        before, total = total, total + int(sign + term)
        steps.append(f" {before} {sign} {term} = {total}")
    return [f"{step} " for step in steps[:-1]] + steps[-1:]


TASK = ChainSum
