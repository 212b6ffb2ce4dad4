"""What a process needs before an engine starts in it. Here alone the engine's code changes its environment."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading

from skd_plugin.seams import rebind

ENGINE_PROCESS = "EngineCore"  # how the names of vLLM's processes begin that hold an engine and nothing else


def set_up_offline() -> None:
    """For engines in this process, without Ray. vLLM reads it when it is imported, so that this comes before."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def set_up_skd() -> None:
    """For an engine with teacher and student: vLLM's first model runner, models of different padding, and stop strings
    that count in the response alone.
    """
    import vllm.v1.engine.output_processor as output_processor

    from skd_plugin.engine.stop_strings import ResponseDetokenizer
    from skd_plugin.engine.vocabulary import allow_padding

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # of use_v2_model_runner, in whichever process that is asked
    allow_padding()
    rebind(output_processor, "IncrementalDetokenizer", ResponseDetokenizer)


def end_with_its_threads() -> None:
    """In a process that holds an engine and nothing else: where one of its threads ends by an error, the process ends,
    and vLLM tells all who wait for an answer. Else it goes on without the thread (`process_output_sockets`, where a
    result cannot be written), and they wait for ever.
    """
    if multiprocessing.current_process().name.startswith(ENGINE_PROCESS):
        threading.excepthook = _end_process


def _end_process(args: threading.ExceptHookArgs) -> None:
    threading.__excepthook__(args)
    sys.stderr.flush()
    os._exit(1)
