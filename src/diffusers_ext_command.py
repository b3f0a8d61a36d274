"""What `diffusers-ext` starts: it answers `--help`, `--version` and wrong words without loading torch.

`import diffusers_ext` imports every public class, and so torch, diffusers and transformers, which takes seconds.
Python does that before it imports any module of the package. So the package is entered here without running its
`__init__`, and `cli.main` runs it when a command begins to work. For this, the file has to lie beside the package.
"""

import importlib.util
import sys

PACKAGE = "diffusers_ext"


def main() -> int:
    if PACKAGE not in sys.modules:
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None  # it lies beside this file
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    from diffusers_ext import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
