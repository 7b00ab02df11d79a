"""The parts of salsa/judges/openai.py: a server's address and key, how it is asked, and how an answer is read."""
