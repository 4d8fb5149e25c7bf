"""Files: atomic writes, bounded reads, locks, and checks of where output may go. Knows nothing about models."""
