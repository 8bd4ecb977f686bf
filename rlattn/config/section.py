"""What every section of a configuration is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, its value and what would be accepted."""


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused, docstrings are the fields' documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
