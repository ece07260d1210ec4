"""Scripts that run in the environment SGLang is installed in, which has none of this project. Each stands alone, but
for what is imported by its place: `pbsd_weights.py` takes a module that needs torch alone, `pbsd_drafting.py` some that
need numpy and numba. The folder is on the path of the server's processes; SGLang finds its plug-in by the distribution
that lies here."""
