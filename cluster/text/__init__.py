"""Tokens and text: tokenizer, detokenizer, chat template."""
