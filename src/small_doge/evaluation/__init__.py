"""How well a model predicts text it has never seen, beside what a compressor and counting make of it."""
