"""The shared core: LoRA coordinates, mixes, packages and steered models. Knows no HTTP server and no command line."""
