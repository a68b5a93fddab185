"""Pure functions on tensors. Nothing in here imports anything of ours."""
