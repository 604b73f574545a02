"""What a run writes for people and other programs, besides its checkpoints."""
