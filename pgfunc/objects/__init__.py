"""Boxes and masks of objects: reading and writing them as text, drawing them, exporting them."""
