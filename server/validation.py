"""Bodies that operators write: strict models, and their first fault as an error that names the field."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from server.errors import InvalidFieldError


class Strict(BaseModel):
    """No type is coerced and no unknown field ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("the text has the character NUL, which cannot be stored; leave it out")
    return text


PlainText = Annotated[str, AfterValidator(_storable)]
"""A text that every database takes."""
Model = TypeVar("Model", bound=Strict)


def parse(model: type[Model], value: object) -> Model:
    """Raises InvalidFieldError, whose `param` is the path of the first field at fault, such as ``arms[0].weight``."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")[:128]
    said = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("missing", "value_error") else f" is {repr(first['input'])[:80]}"
    raise InvalidFieldError(f"{path or 'the body'}{given}: {said[:1].lower()}{said[1:]}", path or None)
