"""`skd.teacher` and `skd.student` of a recipe: the two models, and what each of them reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from skd_plugin.config.section import Section


class TeacherPromptConfig(Section):
    """What the teacher reads in place of the student's prompt (host/teacher_prompts.py)."""

    system: str | None = Field(
        None,
        description="system message before the prompt, in place of one that is there; without a chat template text",
    )
    template: str | None = Field(
        None,
        description="the user's turn, with columns of the row in braces, of a task {input}, {reference} and {answer}; "
        "default: the student's",
    )
    column: str | None = Field(None, description="a column with the user's turn or a list of messages, in its place")
    examples: str | None = Field(
        None, description='a .json or .jsonl file of turns before the prompt, each {"input": ..., "output": ...}'
    )
    max_len: int | None = Field(
        None, ge=2, description="tokens of the longest one; default: as of the student's, what data.max_len leaves"
    )

    @field_validator("examples")
    @classmethod
    def _wherever_it_is_read(cls, path: str | None) -> str | None:
        return None if path is None else str(Path(path).resolve())

    @model_validator(mode="after")
    def _one_maker(self) -> TeacherPromptConfig:
        if self.template is not None and self.column is not None:
            raise ValueError("template and column both make the teacher's prompt; leave one of them out")
        return self


class StudentConfig(Section):
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="switches of the chat template, e.g. {enable_thinking: false}; the teacher has its own"
    )


class FollowConfig(Section):
    """A teacher that moves: every `every` steps, teacher <- ema x teacher + (1 - ema) x student."""

    ema: float = Field(0.0, ge=0, lt=1, description="how much of it stays; 0: it becomes the student of that step")
    every: int = Field(1, ge=1, description="steps between two moves")


ONLY = ""  # the name of a teacher that is the only one


def teacher_words(name: str) -> str:
    """What a person calls it."""
    return f"teacher '{name}'" if name != ONLY else "teacher"


class ServerConfig(Section):
    """How the servers of `skd.teacher.url` are asked (served/)."""

    model: str | None = Field(
        None, description="the teacher's name there (--served-model-name); default: skd.teacher.model_name_or_path"
    )
    key_env: str | None = Field(
        None, description="name of the environment variable that holds the key, which is written nowhere"
    )
    timeout_s: float = Field(120.0, gt=0, description="of one request; it is then sent again")
    patience_s: float = Field(
        600.0, gt=0, description="how long a request is repeated before the run ends; a server may be away for so long"
    )
    in_flight: int = Field(16, ge=1, description="requests that one server has at once of each engine")


class TeacherConfig(Section):
    model_name_or_path: str = Field(
        description="the teacher: a folder or a Hugging Face name. With url only its configuration and tokenizer"
    )
    url: str | tuple[str, ...] | None = Field(
        None,
        description="the teacher is elsewhere and reads finished texts: the address of its server (vllm serve), or a "
        "list of them; docs/served_teacher.md",
    )
    server: ServerConfig = ServerConfig()
    prompt: TeacherPromptConfig | None = Field(
        None, description="a prompt of the teacher's own, by its own chat template; default: it reads the student's"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="switches of the teacher's chat template, which then makes a prompt of its own"
    )
    own_thinking: bool = Field(
        False, description="prompts may end inside a thinking block of one of the two models only"
    )
    follow: FollowConfig | None = Field(
        None,
        description="the teacher moves with the student, whose model it is at the start: {ema: 0.99} a running mean "
        "of its weights, {every: 50} what it was up to 50 steps ago",
    )
    compare: bool = Field(
        True,
        description="the first responses are read by transformers' teacher too, on the controller's CPU, and a run "
        "whose engine has another one ends; seconds, for a teacher of 70 B minutes and its weights in memory",
    )
    engines: int | None = Field(
        None,
        ge=1,
        description="of one among several (skd.teachers): how many of openrlhf.vllm.num_engines have it; default: by "
        "its share of the prompts",
    )

    @property
    def urls(self) -> tuple[str, ...]:
        """Of the servers; empty where the teacher is in the engine."""
        return (self.url,) if isinstance(self.url, str) else self.url or ()

    @field_validator("url")
    @classmethod
    def _addresses(cls, url: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if url is None:
            return None
        if not url:
            raise ValueError("an empty list; name a server, or leave url out for a teacher in the engine")
        return _address(url) if isinstance(url, str) else tuple(_address(one) for one in url)

    @model_validator(mode="after")
    def _server_is_asked(self) -> TeacherConfig:
        if not self.urls and self.server != ServerConfig():
            raise ValueError("server says how the servers of url are asked, but there is no url")
        return self


def _address(url: str) -> str:
    """Without what follows the port but a path; /v1 is added where it is asked.

    Raises:
        ValueError: it is none, or has something secret in it, which would stand in config.yaml.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"'{url}' is no address; write it as http://HOST:PORT")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "the address of a server holds a name, a password or a query, and would be written down; give the key in "
            "an environment variable (skd.teacher.server.key_env)"
        )
    return url.rstrip("/").removesuffix("/v1")
