"""What Ray has too little of: the processes of a run wait for it without a word and without an end."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray

from skd_plugin.run_folder import RunFolder, replace_text

POLL_S = 10.0


def tell_while_starting(folder: RunFolder) -> None:
    """Keeps `folder.ray_waits` up to date, beside what the process does, until its stage is another one. A file of its
    own: the status is written by whoever is at work.
    """
    stage = folder.status.read().get("stage")

    def tell() -> None:
        while folder.status.read().get("stage") == stage:
            if words := missing(ray.util.placement_group_table(), ray.cluster_resources()):
                replace_text(folder.ray_waits, words)
            else:
                folder.ray_waits.unlink(missing_ok=True)
            time.sleep(POLL_S)
        folder.ray_waits.unlink(missing_ok=True)

    threading.Thread(target=tell, daemon=True).start()


def missing(groups: Mapping[str, Mapping[str, Any]], cluster: Mapping[str, float]) -> str:
    """In words; empty where every group of processes has its place.

    Args:
        groups: Ray's table of placement groups.
        cluster: what all its nodes have.
    """
    asked: Counter[str] = Counter()
    for group in groups.values():
        if group["state"] in ("CREATED", "PENDING", "RESCHEDULING"):
            for bundle in group["bundles"].values():
                asked.update({name: math.ceil(amount) for name, amount in bundle.items()})
    if all(group["state"] not in ("PENDING", "RESCHEDULING") for group in groups.values()):
        return ""
    wants = ", ".join(f"{count} {name} (there are {cluster.get(name, 0):g})" for name, count in sorted(asked.items()))
    return f"Ray waits for resources: the processes of this run need {wants}"
