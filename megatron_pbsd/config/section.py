"""What every section of the configuration is: frozen, without unknown keys, completed from its field's default."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, given: Any) -> Any:
        """A section of which some keys are given has others from the default of the field it stands in: an algorithm
        may have other defaults for its loss than the loss itself."""
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return _completed(given, defaults) if isinstance(given, dict) else given


def _completed(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`given`, whose sections also have what their defaults were made with. Of a union, whose variants have a `name`,
    that is for the default's variant, which is also the one that is meant if there is no name."""
    completed = dict(given)
    for key, section in given.items():
        default = defaults.get(key)
        if not isinstance(section, dict) or not isinstance(default, Section):
            continue
        tag = {"name": default.name} if "name" in type(default).model_fields else {}
        if section.get("name", tag.get("name")) == tag.get("name"):
            chosen = tag | {name: getattr(default, name) for name in default.model_fields_set}
            completed[key] = {**chosen, **_completed(section, chosen)}
    return completed
