"""The scheduler's side: which blocks are visual, and who owns which page."""
