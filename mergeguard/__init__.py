"""mergeguard: after someone merges my model into theirs, can I still prove that it is mine?

`import mergeguard` is light: torch and transformers load with the first call that needs them.
"""

from __future__ import annotations

__version__ = "0.1.0"
