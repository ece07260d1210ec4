"""The whole run as one typed tree. YAML in, `--a.b value` overrides on top, every error at once.

A component is handed the part it needs, never the tree. Durations are seconds, sizes bytes unless a name says
otherwise. `launcher/overrides.py` turns files and command lines into a `RunConfig`.
"""

from megatron_pbsd.config.algorithms import (
    AlgorithmConfig,
    CISPOConfig,
    DAPOConfig,
    DistillConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    PBSDConfig,
    PenalisedConfig,
    PolicyGradientConfig,
    PPOConfig,
    PrivilegedConfig,
    ReinforcePPConfig,
    RLOOConfig,
    SFTConfig,
)
from megatron_pbsd.config.cluster import ClusterConfig, ContainerConfig, SlurmConfig
from megatron_pbsd.config.learner import LearnerConfig, MoEConfig, OptimizerConfig, ParallelConfig
from megatron_pbsd.config.losses import (
    Band,
    CustomLossConfig,
    GeometricRejectionConfig,
    IcePopConfig,
    JSDLossConfig,
    MismatchConfig,
    NoMismatchConfig,
    PolicyLoss,
    PolicyLossConfig,
    Reduced,
    ReverseKLLossConfig,
    SequenceMISConfig,
    SequenceTISConfig,
    SFTLossConfig,
    SupervisedLoss,
    TeacherLoss,
    TokenTISConfig,
    ValueLossConfig,
)
from megatron_pbsd.config.model import ModelConfig
from megatron_pbsd.config.rollout import (
    EnvironmentConfig,
    EvaluationConfig,
    RolloutConfig,
    SGLangConfig,
    SpeculationConfig,
    TransportConfig,
)
from megatron_pbsd.config.run import BestConfig, CheckpointConfig, ObservabilityConfig, RunConfig
from megatron_pbsd.config.section import Fraction, Positive, PositiveInt, Section
