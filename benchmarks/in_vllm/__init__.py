"""The merge inside vLLM, with and without the plugin: at its dispatcher, and in its engine."""
