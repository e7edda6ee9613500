"""What is wrong with this machine, and the cure: `glm doctor`.

    diagnosis.py   all checks by name; their findings as JSON and as lines to read
    finding.py     what a check finds: ok, warn or fail, a reason, a cure, and what may be repaired without asking
    software.py    Python, packages that do not fit together, native kernels, the sandbox
    hardware.py    processor, threads, memory, accelerators, limits
    places.py      folders: state, models, caches, what was left half
    outside.py     terminal, ports, clock, the network

Nothing here needs torch or transformers: a doctor must also work where the patient does not. A check that fails in an
unexpected way is a finding, not the end.
"""
