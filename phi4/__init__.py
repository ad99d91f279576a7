"""phi4: pretraining, midtraining, SFT and DPO of Phi-4 on one megatron-core engine."""

__version__ = "0.1.0"
