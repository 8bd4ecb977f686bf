"""The loop around the step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlattn.config.section import Positive, Section
from rlattn.config.task import TaskConfig


class TrainerConfig(Section):
    """The loop around the step."""

    steps: Positive = 500
    """Rollout batches."""
    prompts_per_step: Positive = 64
    """Prompts in a batch; responses in a batch are this times `rollout.num_generations`."""
    eval_steps: Annotated[int, Field(ge=0)] = 50
    """Evaluate every so many steps, and before and after; 0 never evaluates."""
    eval_samples: Positive = 1
    """Completions per test problem; accuracy is their mean (avg@k) at `eval_temperature`."""
    eval_temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Sampling temperature of evaluation; 0 is greedy."""
    eval_tasks: list[TaskConfig] = Field(default_factory=list)
    """Further benchmarks that evaluation asks, such as `{name: math500, options: {data: DIR}}`; logged as
    `eval/<name>/accuracy`."""
    save_steps: Annotated[int, Field(ge=0)] = 50
    """Checkpoint every so many steps, and after the last; 0 saves only after the last."""
    save_total_limit: Positive = 2
    """Checkpoints kept, beside the best one."""
    checkpoint_url: str | None = None
    """Copies of the checkpoints kept, and of the run's metrics, go to this fsspec URL (`s3://bucket/run`, `gs://...`);
    `--resume` with an empty `output_dir` goes on from there."""
    best_metric: str | None = None
    """Metric of evaluation, such as `eval/accuracy`, by which the best checkpoint is chosen: an evaluation that
    surpasses all before it saves at once. None chooses none."""
    greater_is_better: bool = True
    """The best `best_metric` is the greatest, not the least."""
    trace_step: Positive | None = None
    """Record who did what when in this step, counted from 1: `trace.json` in Chrome's format, for Perfetto."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row, with no new checkpoint in between, everything is started again from the newest one after a
    policy rank (or what else cannot be replaced alone) died or hung; 0 ends the run."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers beside `metrics.jsonl`; each needs its extra."""
    log_completions: Annotated[int, Field(ge=0)] = 8
    """Completions with their token signals kept for the report at each evaluation."""

    @model_validator(mode="after")
    def _best_is_evaluated(self) -> TrainerConfig:
        measured = ["eval/accuracy", *(f"eval/{task.name}/accuracy" for task in self.eval_tasks)]
        if self.best_metric is not None and self.best_metric not in measured:
            raise ValueError(
                f"best_metric={self.best_metric!r} must be null or what evaluation measures: {', '.join(measured)}"
            )
        if self.best_metric and not self.eval_steps:
            raise ValueError(f"best_metric={self.best_metric!r} needs evaluations: eval_steps above 0")
        return self
