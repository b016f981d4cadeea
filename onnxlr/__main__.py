"""`python -m onnxlr` is the command `onnxlr`."""

from onnxlr.cli import main

if __name__ == "__main__":
    main()
