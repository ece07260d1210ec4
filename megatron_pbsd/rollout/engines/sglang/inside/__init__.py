"""Scripts that run in the environment SGLang is installed in, which has none of this project. Each stands alone."""
