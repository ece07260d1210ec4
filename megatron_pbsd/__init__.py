"""RL post-training for LLM agents: Megatron-core learners, divided rollouts, turn-level credit (PBSD)."""

__version__ = "0.1.0"
