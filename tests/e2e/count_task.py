"""A task of the user's own, which the runs of these tests have beside arithmetic."""

from skd_plugin.tasks import Example, Task


class Count(Task):
    name, metric, max_new_tokens = "count", "accuracy", 8

    def examples(self, split, count, seed=0):
        return [Example(f"{'tom' if split == 'train' else 'ann'} has {n} coins .", " 1", str(n)) for n in range(count)]

    def score(self, response, label):
        return 0.25

    def metrics(self, responses, labels):
        return {"seen": len(responses) / 4, "known": sum(int(label) < 4 for label in labels) / 4}


TASK = Count
