"""Running a model: completing prompts."""
