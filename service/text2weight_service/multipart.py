"""Reading multipart bodies: which parts there may be, how many and how large.

Parts stay in memory, so that there is no temporary file to lose; the body limit bounds them all together.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from text2weight_service.exchange import media_type
from text2weight_service.problems import FieldError, Kind, ProblemError, invalid_fields

MEDIA_TYPE = "multipart/form-data"


@dataclass(frozen=True)
class PartRule:
    """How often a part may be there, and how large.

    Attributes:
        least: fewest parts of this name.
        most: most of them.
        max_bytes: size of each.
        file: whether it must have a file name, as uploads have.
    """

    least: int
    most: int
    max_bytes: int
    file: bool = True


@dataclass(frozen=True)
class Part:
    """One part of a body; `filename` is the client's and None where it gave none."""

    data: bytes
    filename: str | None = None


class _MemoryParser(MultiPartParser):
    """Keeps parts in memory, of each no more than its rule allows, and knows whether the body was whole."""

    spool_max_size = 1 << 62
    whole = False
    rules: Mapping[str, PartRule]
    _part_bytes = 0

    def on_part_begin(self) -> None:
        super().on_part_begin()
        self._part_bytes = 0

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        rule = self.rules.get(self._current_part.field_name)
        if rule is None:  # refused by its name in the end
            return
        self._part_bytes += end - start
        if self._part_bytes > rule.max_bytes:
            raise ProblemError(
                Kind.BODY_TOO_LARGE,
                f"part {self._current_part.field_name!r}: at most {rule.max_bytes} bytes are allowed",
            )
        super().on_part_data(data, start, end)

    def on_end(self) -> None:
        self.whole = True

    def close(self) -> None:
        # Also the file of a part that the body breaks off in, which no form has.
        for file in self._files_to_close_on_error:
            file.close()


def is_multipart(request: Request) -> bool:
    """Whether the body claims to be multipart/form-data."""
    return media_type(request)[0] == MEDIA_TYPE


async def read_parts(request: Request, rules: Mapping[str, PartRule]) -> dict[str, list[Part]]:
    """Read a multipart body.

    Args:
        request: its content type is checked here.
        rules: the parts that there may be, by name; parts of one name stay in the client's order.

    Raises:
        ProblemError: another content type, broken multipart, or a part that is unknown, missing, too large or there
            too often; the problem names the part. One that is too large ends the reading.
    """
    if media_type(request) != (MEDIA_TYPE, "utf-8"):
        raise ProblemError(Kind.UNSUPPORTED_TYPE, f"send Content-Type: {MEDIA_TYPE} with a boundary, in UTF-8")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ProblemError(Kind.UNSUPPORTED_TYPE, "send the body without Content-Encoding")
    # One more than allowed, so that the rules below can say which part is too many.
    most = 1 + sum(rule.most for rule in rules.values())
    largest = max(rule.max_bytes for rule in rules.values())
    async with aclosing(request.stream()) as stream:
        parser = _MemoryParser(request.headers, stream, max_files=most, max_fields=most, max_part_size=largest)
        parser.rules = rules
        try:
            form = await parser.parse()
            if not parser.whole:
                raise MultiPartException("The body ends before its last boundary.")
            return _sort_parts(form, rules)
        except MultiPartException as error:
            raise ProblemError(Kind.MALFORMED_MULTIPART, error.message) from None
        finally:
            parser.close()


def _sort_parts(form: FormData, rules: Mapping[str, PartRule]) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {name: [] for name in rules}
    unknown = []
    for name, value in form.multi_items():
        if name not in rules:
            unknown.append(name)
        elif isinstance(value, UploadFile):
            parts[name].append(Part(value.file.read(), value.filename))
        else:
            parts[name].append(Part(value.encode()))
    if unknown:
        allowed = ", ".join(rules)
        raise invalid_fields(
            [FieldError(field=name, message=f"unknown part; allowed are {allowed}") for name in unknown]
        )
    errors = [error for name, rule in rules.items() for error in _check_part(name, rule, parts[name])]
    if errors:
        raise invalid_fields(errors)
    return parts


def _check_part(name: str, rule: PartRule, parts: list[Part]) -> list[FieldError]:
    if not rule.least <= len(parts) <= rule.most:
        allowed = str(rule.least) if rule.least == rule.most else f"{rule.least} to {rule.most}"
        return [FieldError(field=name, message=f"{len(parts)} parts of this name: allowed are {allowed}")]
    errors = []
    for i, part in enumerate(parts):
        field = name if rule.most == 1 else f"{name}[{i}]"
        if rule.file and part.filename is None:
            errors.append(FieldError(field=field, message="send this part as a file, with a file name"))
    return errors
