"""`python -m glmkit.runtime FOLDER --prompt "你好"`."""

import sys

from glmkit.runtime.terminal import main

sys.exit(main())
