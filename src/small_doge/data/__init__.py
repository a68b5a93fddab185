"""Text to tokens: corpora, the tokenizer, packed rows, conversations and preferences."""
