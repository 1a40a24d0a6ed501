"""python -m recursive_jax.cli"""

import sys

from recursive_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
