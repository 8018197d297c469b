"""The reference engine: a small Llama with an OpenAI-like HTTP front, whose KV cache lives in a p2pkv node."""
