"""Watching and changing a Hugging Face TRL trainer."""
