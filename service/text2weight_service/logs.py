"""Structured logs on stderr: JSON lines, or readable lines when a person is watching."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TextIO

import structlog

from text2weight_service.tracing import add_trace_id


def configure_logging(level: str) -> None:
    """Send the service's and every library's log lines through structlog to stderr.

    The service's own take no detour through `logging`, which is two thirds of a line's cost, and there is one with
    every answer.

    Args:
        level: least severe level shown: "debug", "info", "warning" or "error".
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_trace_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Local variables stay out of tracebacks: they hold tensors and secrets.
    if sys.stderr.isatty():
        rendering: list[structlog.typing.Processor] = [
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        ]
    else:
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        rendering = [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(allow=())],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*shared, *rendering],
        logger_factory=partial(_NamedLogger, sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )


class _NamedLogger(structlog.WriteLogger):
    """Writes lines to a stream; `add_logger_name` reads its name."""

    def __init__(self, stream: TextIO, name: str) -> None:
        super().__init__(stream)
        self.name = name
