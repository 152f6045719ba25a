"""The worker's side: cache updates and attention over text pages and visual pages."""
