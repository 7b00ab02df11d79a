"""How a language model is reached, asked over the network, and read: the parts of salsa/judges/openai.py."""
