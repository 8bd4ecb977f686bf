"""The run's configuration: one pydantic tree, read from YAML plus `key=value` overrides.

Every field has a default, a bound and a docstring; unknown keys are refused with the nearest known name. Defaults are
METHOD's ([Li 2026], arXiv 2510.13554v2) where it gives one, else TRL's. Nothing here is rewritten after validation:
what `--dry-run` prints is what runs.
"""

from rlattn.config.algorithm import AlgorithmConfig, CreditConfig
from rlattn.config.model import ModelConfig, WarmupConfig
from rlattn.config.policy import OWNED_DEEPSPEED_KEYS, LoRAConfig, PolicyConfig
from rlattn.config.ppo import PPOConfig
from rlattn.config.ray import RayConfig
from rlattn.config.read import describe, differences, load_config, override, read_tree, validate
from rlattn.config.rewards import RewardFunctionConfig, RewardsConfig
from rlattn.config.rollout import RolloutConfig
from rlattn.config.run import FREE, RunConfig
from rlattn.config.section import ConfigError, Positive, Seconds, Section, Share
from rlattn.config.signals import FlowConfig, HeadsConfig, SignalsConfig
from rlattn.config.task import TaskConfig
from rlattn.config.trainer import TrainerConfig

__all__ = [
    "FREE",
    "OWNED_DEEPSPEED_KEYS",
    "AlgorithmConfig",
    "ConfigError",
    "CreditConfig",
    "FlowConfig",
    "HeadsConfig",
    "LoRAConfig",
    "ModelConfig",
    "PPOConfig",
    "PolicyConfig",
    "Positive",
    "RayConfig",
    "RewardFunctionConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "Seconds",
    "Section",
    "Share",
    "SignalsConfig",
    "TaskConfig",
    "TrainerConfig",
    "WarmupConfig",
    "describe",
    "differences",
    "load_config",
    "override",
    "read_tree",
    "validate",
]
