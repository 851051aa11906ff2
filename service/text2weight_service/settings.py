"""Settings of the service: environment variables `T2W_*`, typed, with units in their names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from text2weight_service.auth import KeysError, parse_keys
from text2weight_service.schemas import MAX_SAMPLES

_PREFIX = "T2W_"
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class Settings(BaseSettings):
    """All settings; field `http_port` is the variable `T2W_HTTP_PORT`. An empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    http_host: str = Field(default="127.0.0.1", description="address to listen on")
    http_port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    checkpoint: str | None = Field(
        default=None, description="checkpoint directory or hf:owner/name@revision; unset: bundled"
    )
    device: str = Field(default="cpu", min_length=1, description="torch device of the denoiser and the text encoder")
    torch_threads: int | None = Field(default=None, ge=1, description="CPU threads of the model; unset: usable cores")

    max_batch_size: int = Field(default=32, ge=1, description="most requests in one denoiser call")
    queue_size: int = Field(default=256, description="most heads accepted and unanswered; more get 429")
    request_timeout_s: float = Field(default=30.0, gt=0, description="from first byte of a request to its answer")
    drain_timeout_s: float = Field(default=20.0, ge=0, description="time to finish accepted requests at shutdown")

    max_body_bytes: int = Field(default=262_144, ge=1024, description="largest request body; larger gets 413")
    header_timeout_s: float = Field(
        default=10.0, gt=0, description="for a client to send the headers of its next request; then it is cut off"
    )
    send_timeout_s: float = Field(
        default=30.0, gt=0, description="for a client to read what waits for it; then it is cut off"
    )
    max_connections: int = Field(default=1024, ge=1, description="most open connections")
    max_upload_bytes: int = Field(default=16_777_216, ge=1024, description="the same for a multipart body of files")
    max_classes: int = Field(default=256, ge=2, le=256, description="most class names in one request")
    max_steps: int = Field(default=1000, ge=1, le=1000, description="most denoiser steps in one request")

    self_check_s: float = Field(default=30.0, gt=0, description="idle time after which the device is checked")

    head_cache_mb: int = Field(default=64, ge=0, description="finished heads kept in this process; 0: no head cache")
    head_ttl_s: int = Field(default=86_400, ge=1, description="life of a finished head in Redis")
    embedding_cache_size: int = Field(default=20_000, ge=1, description="text embeddings kept in this process")
    redis_url: SecretStr | None = Field(
        default=None, description="Redis shared by workers: embeddings, heads, counts of limits; unset: none"
    )
    redis_timeout_s: float = Field(default=0.05, gt=0, description="longest wait of a request for Redis, altogether")
    embedding_ttl_s: int = Field(default=604_800, ge=1, description="life of an embedding in Redis")

    api_keys: SecretStr | None = Field(
        default=None, description="keys as NAME:SHA256 entries, separated by commas; unset: see api_keys_file"
    )
    api_keys_file: str | None = Field(default=None, description="file of such entries; followed while serving")
    allow_anonymous: bool = Field(default=False, description="serve other machines without a key")
    public_metrics: bool = Field(default=False, description="answer /metrics without a key")
    rate_limit: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour|day)$",
        description='requests per client over time, such as "600/minute"; more get 429; unset: no limit',
    )
    max_concurrent_per_key: int | None = Field(
        default=None, ge=1, description="requests of one client at once; more get 429; unset: no limit"
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least severe log line")

    @field_validator("queue_size")
    @classmethod
    def _samples_have_places(cls, value: int) -> int:
        if value < MAX_SAMPLES:
            raise ValueError(f"must be at least {MAX_SAMPLES}: one request may ask for so many samples")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(_REDIS_SCHEMES):
            raise ValueError(f"must start with one of {', '.join(_REDIS_SCHEMES)}")
        return value

    @field_validator("api_keys")
    @classmethod
    def _keys_are_entries(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            parse_keys(value.get_secret_value() if value is not None else "", "T2W_API_KEYS")
        except KeysError as error:
            raise ValueError(str(error).removeprefix("T2W_API_KEYS: ")) from None
        return value

    @field_validator("allow_anonymous")
    @classmethod
    def _keys_or_anonymous(cls, value: bool, info: ValidationInfo) -> bool:
        if value and (info.data.get("api_keys") or info.data.get("api_keys_file")):
            raise ValueError("must not be true where keys are set: choose one of the two")
        return value

    @property
    def has_keys(self) -> bool:
        """Whether clients need a key."""
        return self.api_keys is not None or self.api_keys_file is not None

    def shown(self) -> dict[str, object]:
        """Every setting as plain JSON values, secrets masked; safe to log and to publish."""
        return self.model_dump(mode="json")


def variable_name(field: str) -> str:
    """Environment variable of a settings field: `http_port` -> `T2W_HTTP_PORT`."""
    return _PREFIX + field.upper()


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Names in the environment that start with `T2W_` and set nothing, most likely typing mistakes."""
    known = {variable_name(field) for field in Settings.model_fields}
    names = os.environ if environment is None else environment
    return sorted(name for name in names if name.upper().startswith(_PREFIX) and name.upper() not in known)
