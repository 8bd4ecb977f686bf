"""Where actors run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlattn.config.section import Positive, Seconds, Section


class RayConfig(Section):
    """Where actors run."""

    address: str | None = None
    """A running cluster (`auto` or `ray://...`); None starts Ray on this machine."""
    num_cpus: Positive | None = None
    """Logical CPUs of a local Ray; None means as many as the run's actors reserve, or the machine's if more."""
    placement: Literal["separate", "colocate"] = "separate"
    """`separate`: engines have GPUs of their own. `colocate`: engine i shares the GPU (without GPUs the node) of policy
    rank i, which leaves it a part by `policy.gpus_per_rank` below 1; engines beyond the ranks have their own."""
    policy_labels: dict[str, str] = Field(default_factory=dict)
    """Node labels, as `ray start --labels` gives them, where policy and critic ranks may run; such as
    `{ray.io/accelerator-type: H100}`."""
    rollout_labels: dict[str, str] = Field(default_factory=dict)
    """Likewise, where engines may run."""
    placement_timeout_s: Seconds = 120
    """Longest wait for the actors' resources."""

    @model_validator(mode="after")
    def _together(self) -> RayConfig:
        both = self.policy_labels.keys() & self.rollout_labels.keys()
        apart = sorted(key for key in both if self.policy_labels[key] != self.rollout_labels[key])
        if self.placement == "colocate" and apart:
            raise ValueError(
                f"placement=colocate puts ranks and engines on the same nodes, but policy_labels and rollout_labels "
                f"differ in {apart[0]!r}: {self.policy_labels[apart[0]]!r} and {self.rollout_labels[apart[0]]!r}"
            )
        return self
