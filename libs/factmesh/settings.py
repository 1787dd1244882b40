"""Settings: what an operator may set, read once at start from the environment, checked, and then frozen.
Constructors, no container: a service makes one `Settings` and hands its parts on; nothing else reads the environment.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import pydantic
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from factmesh.errors import SettingsError

_NAMESPACE = re.compile(r"[a-z][a-z0-9_]{0,30}")
_BROKER = re.compile(r"(?:[A-Z_]+://)?(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")


class Settings(BaseSettings):
    """Common to every service: each field is the variable `FACTMESH_<FIELD>`. A service adds its own by subclassing."""

    model_config = SettingsConfigDict(env_prefix="FACTMESH_", frozen=True, extra="ignore", hide_input_in_errors=True)

    service: str = Field(default="factmesh", description="the name in logs, traces, metrics and ledger rows")
    namespace: str = Field(default="", description="prefix of topics, groups and schemas: several meshes on one stack")
    project: Path | None = Field(default=None, description="the project folder: schemas, workflows, adapters, …")

    kafka_bootstrap: str = Field(description="host:port[,host:port] of the brokers")
    group_protocol: Literal["consumer", "classic"] = Field(
        default="consumer", description="classic: brokers before 4.0"
    )
    postgres_dsn: SecretStr = Field(description="postgresql://role:password@host:port/database, the service's own role")
    transaction_timeout_s: float = Field(default=20.0, gt=0, le=300, description="frees the locks of a stopped replica")

    schemas_dir: Path | None = Field(default=None, description="the platform's schemas; default: the installed ones")
    registry_url: str | None = Field(default=None, description="a Confluent-compatible registry, not the directory")

    http_host: str = Field(default="127.0.0.1", description="where /healthz, /readyz, /metrics and the service listen")
    http_port: int = Field(default=0, ge=0, le=65535, description="0: a free one, logged at start")

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    trace_file: Path | None = Field(default=None, description="spans as JSON lines, besides OTLP")
    otlp_endpoint: str | None = Field(default=None, description="an OTLP/HTTP collector")
    trace_sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0)

    batch_max: int = Field(default=500, ge=1, le=10_000, description="messages in one transaction, at most")
    halt_on_flood: bool = Field(
        default=True, description="stop a partition of which half would die; false lets known garbage pass to the DLQ"
    )
    dedup_horizon_days: int = Field(default=14, ge=1, description="how long strangers' ids are remembered")
    audit_days: int = Field(default=400, ge=2, description="how long ledger rows are kept")

    @field_validator("namespace")
    @classmethod
    def _namespace_is_a_name(cls, value: str) -> str:
        if value and not _NAMESPACE.fullmatch(value):
            raise ValueError("must be empty or match [a-z][a-z0-9_]{0,30}: it prefixes topics and PostgreSQL schemas")
        return value

    @field_validator("kafka_bootstrap")
    @classmethod
    def _brokers_have_ports(cls, value: str) -> str:
        # The client would wait for ever for what can never answer.
        if not all(_BROKER.fullmatch(broker.strip()) for broker in value.split(",")):
            raise ValueError("write it as host:port, several separated by commas")
        return value

    @field_validator("project", "schemas_dir")
    @classmethod
    def _folder_exists(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"{value} is not a folder")
        return None if value is None else value.resolve()

    @model_validator(mode="after")
    def _clocks_agree(self) -> Self:
        if self.dedup_horizon_days >= self.audit_days:
            raise ValueError(
                "dedup_horizon_days must be shorter than audit_days: a receiver must remember ids longer than its"
                " sender can emit them again (the retention rule)"
            )
        return self

    @property
    def topic_prefix(self) -> str:
        """What stands before every topic and consumer group of this mesh."""
        return f"{self.namespace}." if self.namespace else ""

    def schema_name(self, name: str) -> str:
        """The PostgreSQL schema (and role) of `name` in this mesh."""
        return f"{self.namespace}_{name}" if self.namespace else name


S = TypeVar("S", bound=BaseSettings)


def load(kind: type[S], **given: Any) -> S:
    """The settings from the environment, or a `SettingsError` that names every variable that is missing or wrong."""
    try:
        return kind(**given)
    except pydantic.ValidationError as error:
        prefix = str(kind.model_config.get("env_prefix", ""))
        problems = []
        for item in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in item["loc"])
            problems.append(f"{prefix}{name.upper()}: {item['msg']}" if name else str(item["msg"]))
        raise SettingsError(
            "cannot start, the settings are not complete: " + "; ".join(problems),
            hint="set these environment variables and start again",
        ) from None
