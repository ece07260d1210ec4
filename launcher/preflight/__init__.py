"""`pbsd preflight`: whether machines are fit for a run, found out before it starts.

Every node says what it is like (`host`, `gpus` → `facts`), the nodes tell each other and measure what is between them
(`exchange`, `bandwidth`), and pure rules over all of that name what is wrong and what helps (`rules` → `findings`).
docs/preflight.md has the table of checks.
"""
