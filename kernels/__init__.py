"""Attention statistics that never materialise a map, and their capture inside a Hugging Face forward."""

if __name__ == "kernels":  # would shadow the PyPI package `kernels`, which transformers and TRL import
    raise ImportError(
        "this folder is `rlattn.kernels`; it must not be imported as `kernels`. "
        "Install the project (`pip install -e .`) and keep its root off sys.path."
    )

from .attention import packed_attention, register
from .capture import Capture, LayerRange, capture_layers, spaced_layers
from .flow import FlowMap, FlowOptions
from .padded import PaddedCapture, Padding, listen
from .statistics import AttentionStatistics, StatisticsOptions, attention_statistics

__all__ = [
    "AttentionStatistics",
    "Capture",
    "FlowMap",
    "FlowOptions",
    "LayerRange",
    "PaddedCapture",
    "Padding",
    "StatisticsOptions",
    "attention_statistics",
    "capture_layers",
    "listen",
    "packed_attention",
    "register",
    "spaced_layers",
]
