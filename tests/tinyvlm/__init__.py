"""A tiny trained vision-language model and the data that it reads: see README.md."""
