"""Files that are written all or nothing, and read within bounds. Knows nothing about models."""
