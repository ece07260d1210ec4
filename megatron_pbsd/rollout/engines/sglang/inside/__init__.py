"""Scripts that run in the environment SGLang is installed in, which has none of this project. Each stands alone, but
for `pbsd_drafting.py`, which imports what needs numpy and numba alone. The folder is on the path of the server's
processes; SGLang finds its plug-in by the distribution that lies here."""
