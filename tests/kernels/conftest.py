"""The interpreter must be chosen before Triton is imported: its tests run in their own process.

``test_interpreter.py`` starts that process; without the variable the folder is not collected.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
