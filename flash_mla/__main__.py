"""`python -m flash_mla` is `flash-mla`."""

from flash_mla.cli import main

if __name__ == "__main__":
    main()
