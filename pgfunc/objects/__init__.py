"""Boxes and masks: what a model writes about them, and what is drawn and exported."""
