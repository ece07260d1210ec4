"""Where components run, and how failures of one become one clear message."""
