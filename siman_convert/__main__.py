"""`python -m siman_convert`, which torchrun and accelerate launch need."""

from siman_convert.cli import main

if __name__ == "__main__":
    main()
